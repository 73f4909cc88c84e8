"""Amounts as people write them."""

from __future__ import annotations

import re

from kbit_inductor.errors import InvalidOptionError

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def byte_count(amount: int | str) -> int:
    """Bytes of ``"90 MB"`` and the like: B, kB, MB, GB in powers of 1000, KiB, MiB, GiB in powers of 1024, or a plain number.

    Raises:
        InvalidOptionError: neither.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?i?B)?\s*", str(amount))
    if isinstance(amount, (bool, float)) or matched is None:
        raise InvalidOptionError(f"option 'memory_budget' is {amount!r}; give bytes, or a text such as '90 MB' or '1.5 GiB'")
    unit = (matched[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(matched[1]) * base ** " KMG".index(unit[0] if len(unit) > 1 else " "))


def second_count(amount: float | str) -> float:
    """Seconds of ``"2 ms"`` and the like: s, ms, us or µs, ns, or a plain number of seconds.

    Raises:
        InvalidOptionError: neither, or not above zero.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e-?\d+)?)\s*(s|ms|us|µs|ns)?\s*", str(amount))
    if isinstance(amount, bool) or matched is None or float(matched[1]) <= 0:
        raise InvalidOptionError(
            f"option 'latency_budget' is {amount!r}; give seconds above zero, or a text such as '2 ms' or '300 us'"
        )
    return float(matched[1]) * SECONDS[matched[2] or "s"]
