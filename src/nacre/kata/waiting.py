"""Descriptors that have to be listened to: by the shim's loop between calls, and in `wait` while a call blocks.

A blocked call must go on serving all of them: a guest whose console nobody reads stops, and then never answers.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import Protocol

Callback = Callable[[], None]
PATIENCE = "where it goes on, only slowly, raise patience in nacre's config.toml"  # the remedy of all that took too long


class Watcher(Protocol):
    """The half of handler.Host that this module needs."""

    def watch(self, fd: int, callback: Callback, *, write: bool = False) -> None: ...

    def unwatch(self, fd: int) -> None: ...


class Nobody:
    """A Watcher for a process that has no loop of its own: everything happens inside `wait`."""

    def watch(self, fd: int, callback: Callback, *, write: bool = False) -> None: ...

    def unwatch(self, fd: int) -> None: ...


class Watches:
    """Descriptor → callback, mirrored to the loop. One watch a descriptor; to watch both ways, watch a duplicate."""

    def __init__(self, loop: Watcher) -> None:
        self._loop = loop
        self._held: dict[int, tuple[int, Callback]] = {}

    def watch(self, fd: int, callback: Callback, *, write: bool = False) -> None:
        self._held[fd] = (select.POLLOUT if write else select.POLLIN, callback)
        self._loop.watch(fd, callback, write=write)

    def unwatch(self, fd: int) -> None:
        if self._held.pop(fd, None) is not None:
            self._loop.unwatch(fd)

    def wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Serve every descriptor until `done()`; False when the time is over first. Nested waits are fine."""
        deadline = time.monotonic() + timeout_s
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for fd, _events in self._poll(left):
                held = self._held.get(fd)  # a callback before this one may have let it go
                if held is not None:
                    held[1]()
        return True

    def _poll(self, timeout_s: float) -> list[tuple[int, int]]:
        poll = select.poll()
        for fd, (events, _callback) in self._held.items():
            poll.register(fd, events)
        return poll.poll(max(1, int(timeout_s * 1000)))


class Lines:
    """What somebody says, the last bytes of it: evidence. Owns the descriptor it reads."""

    LIMIT = 16 * 1024

    def __init__(self, fd: int, watches: Watches, file: str = "") -> None:
        self._fd, self._watches, self._file = fd, watches, file
        self._kept = bytearray()
        self._written = 0
        os.set_blocking(fd, False)
        watches.watch(fd, self._readable)

    def tail(self, count: int = 15) -> tuple[str, ...]:
        """The last lines, oldest first, made printable."""
        return tuple(self._lines()[-count:])

    def since(self, marker: str, count: int = 18) -> tuple[str, ...]:
        """`count` lines from the last one that holds `marker`; empty when none does."""
        lines = self._lines()
        begin = max((index for index, line in enumerate(lines) if marker in line), default=len(lines))
        return tuple(lines[begin : begin + count])

    def _lines(self) -> list[str]:
        text = bytes(self._kept).decode("utf-8", "replace").replace("\r", "")
        return ["".join(c if c.isprintable() else "?" for c in line)[:300] for line in text.split("\n") if line.strip()]

    def close(self) -> None:
        if self._fd >= 0:
            self._watches.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def drain(self) -> None:
        """All that has been said so far, or by who has ended."""
        before = -1
        while self._fd >= 0 and before != self._written:
            before = self._written
            self._readable()

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:  # ECONNRESET: the writer ended with something of ours unread
            data = b""
        if not data:
            self.close()
            return
        self._kept += data
        del self._kept[: -self.LIMIT]
        self._written += len(data)
        self._keep(data)

    def _keep(self, data: bytes) -> None:
        """Onto the file too, of which there are two at most: a killed shim leaves what its guest said last."""
        if not self._file:
            return
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
            if os.fstat(fd).st_size > self.LIMIT * 4:
                os.rename(self._file, self._file + ".1")
        finally:
            os.close(fd)
