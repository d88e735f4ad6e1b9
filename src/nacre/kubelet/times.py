"""RFC 3339 as Kubernetes writes it: whole seconds, UTC, Z."""

from __future__ import annotations

import calendar
import time


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def micro(seconds: float) -> str:
    """With microseconds, as Lease times are."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}Z"


def parse(text: str) -> float:
    """Unix time of a Kubernetes timestamp; fractions of a second are dropped."""
    return float(calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")))
