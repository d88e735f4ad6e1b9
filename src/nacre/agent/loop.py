"""PID 1's event loop: descriptors, children, deadlines. One thread, one epoll."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from nacre.linux import pids

Callback = Callable[[], object]


class Loop:
    """Owns the epoll and the pipe that SIGCHLD writes to."""

    def __init__(self, on_child: Callable[[int, int], None]) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._on_child = on_child
        self._deadlines: list[tuple[float, Callback]] = []
        self._woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self.watch(self._woken, self._children)

    def watch(self, fd: int, callback: Callback, *, write: bool = False, edge: bool = False) -> None:
        """Call back while `fd` is readable (writable); with `edge` at every change, for both. A second watch replaces the first."""
        events = select.EPOLLOUT if write else select.EPOLLIN
        if edge:
            events = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
        if fd in self._callbacks:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def at(self, deadline: float, callback: Callback) -> None:
        """Call back once time.monotonic() has reached `deadline`."""
        self._deadlines.append((deadline, callback))

    def run(self) -> None:
        """For ever."""
        while True:
            for fd, _events in self._epoll.poll(self._patience()):
                callback = self._callbacks.get(fd)
                if callback is not None:  # one before it may have let it go
                    callback()
            self._overdue()

    def _patience(self) -> float:
        if not self._deadlines:
            return -1
        return max(0.0, min(deadline for deadline, _ in self._deadlines) - time.monotonic())

    def _overdue(self) -> None:
        now = time.monotonic()
        due = [callback for deadline, callback in self._deadlines if deadline <= now]
        self._deadlines = [one for one in self._deadlines if one[0] > now]
        for callback in due:
            callback()

    def _children(self) -> None:
        try:
            os.read(self._woken, 4096)
        except BlockingIOError:
            return
        self.reap()

    def reap(self) -> None:
        """Every child that has ended: containers' processes, and orphans that became PID 1's."""
        for pid, status in pids.ended_children():
            self._on_child(pid, status)
