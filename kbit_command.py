"""The command ``kbit`` while Python still loads torch: seconds in which Ctrl-C ends it, as later, without a traceback.

It is no part of ``kbit_inductor``, whose import loads torch before a line of the command's could run.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Load the command and run it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else whoever started it wants it undisturbed
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kbit_inductor.cli.app import app

    signal.signal(signal.SIGINT, handler)
    app()
