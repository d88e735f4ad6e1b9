"""Who waits for the answer to the request at hand, and for how long: what a long wait goes by, so that our words come before a deadline."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

MARGIN_S = 2.0  # our answer leaves so long before the caller gives up


class Caller:
    """One call's. `left` is set when it went away before its answer; the work for it may still go on."""

    def __init__(self, left_s: float | None = None) -> None:
        self._until = None if left_s is None else time.monotonic() + left_s - MARGIN_S
        self.left = False

    def patience_s(self) -> float | None:
        """Seconds that may still be waited; None without a deadline."""
        return None if self._until is None else max(0.0, self._until - time.monotonic())


_CALLER: ContextVar[Caller] = ContextVar("caller")


def enter(context: Any) -> None:
    """The call of this gRPC context begins, in this task."""
    _CALLER.set(Caller(context.time_remaining()))


def current() -> Caller:
    """The caller that this task works for; one that waits for ever, where it works for none."""
    return _CALLER.get(None) or Caller()
