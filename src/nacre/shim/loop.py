"""A shim's event loop: descriptors, children, and one kind of timer. One thread, one epoll, no inotify.

A callback that raises is written down with its traceback and the loop goes on: one stream's trouble must not take the pod.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable

from nacre.linux import pids

Callback = Callable[[], None]


class Loop:
    """Owns the epoll and the pipe that SIGCHLD writes to."""

    def __init__(self, on_child: Callable[[int, int], None]) -> None:
        self._selector = selectors.EpollSelector()
        self._on_child = on_child
        self._timers: list[tuple[float, int, Callback]] = []
        self._numbers = itertools.count()
        self._woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self.watch(self._woken, self._children)
        self._ending = False

    def watch(self, fd: int, callback: Callback, *, write: bool = False) -> None:
        """Call back while `fd` is readable (writable); a second watch of the same descriptor replaces the first."""
        events = selectors.EVENT_WRITE if write else selectors.EVENT_READ
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def later(self, delay_s: float, callback: Callback) -> None:
        """Call back once, no sooner than in `delay_s` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), callback))

    def run(self) -> None:
        """Until `end`."""
        self._reap()
        while not self._ending:
            self._turn()

    def run_until(self, fd: int) -> None:
        """From within a callback: go on with all else until `fd` is readable. Such waits end in the reverse of the order in which they began."""
        ready: list[int] = []
        self.watch(fd, lambda: ready.append(fd))
        try:
            while not ready:
                self._turn()
        finally:
            self.unwatch(fd)

    def _turn(self) -> None:
        timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, _events in self._selector.select(timeout):
            watched = self._selector.get_map().get(key.fd)
            if watched is not None and watched.data is key.data:  # a callback before this one may have let it go
                _guarded(key.data)
        while self._timers and self._timers[0][0] <= time.monotonic():
            _guarded(heapq.heappop(self._timers)[2])

    def end(self) -> None:
        self._ending = True

    def _children(self) -> None:
        try:
            os.read(self._woken, 4096)
        except BlockingIOError:
            return
        self._reap()

    def _reap(self) -> None:
        """Every child that has ended; a wait for one of them elsewhere (`processes.in_child`) happens before its signal is read."""
        for pid, status in pids.ended_children():
            _guarded(lambda pid=pid, status=status: self._on_child(pid, status))  # type: ignore[misc]  # defaults bind the loop's values


def _guarded(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        sys.excepthook(*sys.exc_info())  # into shim.log
        sys.stderr.flush()
