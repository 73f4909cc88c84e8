"""Logging by topic, switched by the environment variable ``KBIT_LOGS`` in the manner of ``TORCH_LOGS``.

``KBIT_LOGS="capture,pack"`` shows those topics at INFO, ``"+capture"`` at DEBUG, ``"-pack"`` at ERROR only, ``"all"`` every topic.
Without it, warnings are shown and nothing else.
"""

from __future__ import annotations

import logging
import os

from kbit_inductor.errors import InvalidOptionError

TOPICS = ("capture", "passes", "pack", "kernels", "release")
_LEVELS = {"+": logging.DEBUG, "": logging.INFO, "-": logging.ERROR}


def logger(topic: str) -> logging.Logger:
    """The logger of one topic of :data:`TOPICS`."""
    return logging.getLogger(f"kbit_inductor.{topic}")


def parse(setting: str) -> dict[str, int]:
    """``"+capture,pack"`` as ``{"capture": DEBUG, "pack": INFO}``.

    Raises:
        InvalidOptionError: a topic that does not exist.
    """
    levels: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        sign = item[0] if item[0] in "+-" else ""
        topic = item.removeprefix(sign)
        if topic not in (*TOPICS, "all"):
            raise InvalidOptionError(f"KBIT_LOGS: unknown topic {topic!r}; known topics: {', '.join(TOPICS)}, all")
        levels |= dict.fromkeys(TOPICS if topic == "all" else (topic,), _LEVELS[sign])
    return levels


def configure(setting: str | None = None) -> None:
    """Apply ``setting`` (default: the environment's ``KBIT_LOGS``) and print the chosen topics on stderr."""
    levels = parse(os.environ.get("KBIT_LOGS", "") if setting is None else setting)
    if not levels:
        return
    root = logging.getLogger("kbit_inductor")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[kbit %(name)s] %(levelname)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    for topic, level in levels.items():
        logger(topic).setLevel(level)
