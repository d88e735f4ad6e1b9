"""What a container says: from its pipes or terminal into the CRI log, and to whoever is attached.

A log line is `RFC3339Nano stdout|stderr P|F BYTES` (the kubelet's CRI logging format): a line of more than CHUNK bytes is cut into
P…F, an unterminated tail is written as P when the stream ends. A log that cannot be written is not read past: the pipe fills, the
container waits, and `blocked` says why; nothing is dropped. Every RETRY_S, and after a `reopen`, it is tried again.

Everything here is non-blocking: what cannot take bytes now is watched until it can, and whoever feeds it is not read meanwhile. So
a slow client slows what it is attached to, and nothing else of the pod.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from nacre.shim.loop import Loop

CHUNK = 16 * 1024  # bytes of a log line
READ = 64 * 1024
RETRY_S = 1.0


class Log:
    """One container's log file; `path` empty: what it says goes nowhere but to attached clients."""

    def __init__(self, path: str, on_blocked: Callable[[str], None]) -> None:
        self.path = path
        self.blocked = ""  # the errno's words while it cannot be written
        self._on_blocked = on_blocked  # told them when they change, "" once it can be written again
        self._fd = -1
        self._unwritten = b""
        if path:
            self._fd = _opened(path)

    def reopen(self) -> None:
        """After rotation by rename. Raises OSError and keeps the old file when the new one cannot be opened."""
        if self.path:
            fresh = _opened(self.path)
            os.close(self._fd)
            self._fd = fresh

    def write(self, lines: bytes) -> bool:
        """All of `lines` after what could not be written before; False when the file takes no more now, and it is kept."""
        if self._fd < 0:
            return True
        data = self._unwritten + lines
        try:
            written = os.write(self._fd, data) if data else 0
        except OSError as error:
            self._unwritten = data
            self._set(error.strerror or str(error))
            return False
        self._unwritten = data[written:]
        if self._unwritten:
            return self.write(b"")  # the next write says why this one was short
        self._set("")
        return True

    def _set(self, blocked: str) -> None:
        if blocked != self.blocked:
            self.blocked = blocked
            self._on_blocked(blocked)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _opened(path: str) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    os.fchmod(fd, 0o640)
    return fd


class Splitter:
    """Bytes in, log lines out; sans-I/O. Holds the unterminated tail of one stream."""

    def __init__(self, stream: str) -> None:
        self._stream = stream.encode()
        self._tail = b""

    def feed(self, data: bytes, at_ns: int) -> bytes:
        prefix = stamp(at_ns) + b" " + self._stream
        *lines, self._tail = (self._tail + data).split(b"\n")
        out = [piece for line in lines for piece in _cut(prefix, line, final=True)]
        while len(self._tail) > CHUNK:
            out.append(prefix + b" P " + self._tail[:CHUNK] + b"\n")
            self._tail = self._tail[CHUNK:]
        return b"".join(out)

    def end(self, at_ns: int) -> bytes:
        """What is left of an unterminated line."""
        tail, self._tail = self._tail, b""
        return stamp(at_ns) + b" " + self._stream + b" P " + tail + b"\n" if tail else b""


def _cut(prefix: bytes, line: bytes, *, final: bool) -> list[bytes]:
    pieces = []
    while len(line) > CHUNK:
        pieces.append(prefix + b" P " + line[:CHUNK] + b"\n")
        line = line[CHUNK:]
    pieces.append(prefix + (b" F " if final else b" P ") + line + b"\n")
    return pieces


_second = (-1, b"")


def stamp(at_ns: int) -> bytes:
    """RFC 3339 with nanoseconds, UTC; the part down to seconds is made once a second."""
    global _second
    seconds, fraction = divmod(at_ns, 1_000_000_000)
    if _second[0] != seconds:
        _second = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode())
    return _second[1] + b".%09dZ" % fraction


class Outlet:
    """An attached client's descriptor for one stream's bytes. Owns it."""

    def __init__(self, loop: Loop, fd: int, on_room: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._loop, self._fd, self._on_room = loop, fd, on_room
        self._unwritten = b""
        self._ending = False

    @property
    def full(self) -> bool:
        return bool(self._unwritten)

    def write(self, data: bytes) -> bool:
        """Take `data`, at once or as there is room; False when the client has left."""
        self._unwritten += data
        try:
            self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
        except BlockingIOError:
            pass  # watched below until there is room
        except OSError:
            self._unwritten = b""
            return False
        if self._unwritten:
            self._loop.watch(self._fd, self._room, write=True)
        return True

    def end(self) -> None:
        """Close once the client has taken what it was given."""
        self._ending = True
        if not self._unwritten:
            self._close()

    def _room(self) -> None:
        self._loop.unwatch(self._fd)
        self.write(b"")
        if self._unwritten:
            return
        if self._ending:
            self._close()
        else:
            self._on_room()

    def _close(self) -> None:
        self._loop.unwatch(self._fd)
        os.close(self._fd)


class Stream:
    """One descriptor that a container writes to. Owns it; `on_end` is called once, when it is closed and all is in the log."""

    def __init__(self, loop: Loop, fd: int, name: str, log: Log, on_end: Callable[[Stream], None]) -> None:
        self.fd, self.name = fd, name
        self._outlets: list[Outlet] = []
        self._loop, self._log, self._on_end = loop, log, on_end
        self._splitter = Splitter(name)
        self._taken = 0  # bytes read so far
        self._retrying = False
        os.set_blocking(fd, False)
        loop.watch(fd, self._readable)

    def attach(self, fd: int) -> None:
        """What comes from now on goes to `fd` too, which is ours from here."""
        self._outlets.append(Outlet(self._loop, fd, self._resume))

    def drain(self) -> None:
        """Take what lies in the pipe now, as its writer has ended; whoever else holds it open is not waited for."""
        before = -1
        while self.fd >= 0 and not self._log.blocked and before != self._taken:
            before = self._taken
            self._readable()

    def resume(self) -> None:
        """The log may take bytes again."""
        if self.fd >= 0 and self._log.write(b""):
            self._resume()

    def close(self) -> None:
        if self.fd >= 0:
            self._loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1
        for outlet in self._outlets:
            outlet.end()
        self._outlets.clear()

    def _readable(self) -> None:
        try:
            data = os.read(self.fd, READ)
        except BlockingIOError:
            return
        except OSError:  # EIO: a terminal whose last slave was closed
            data = b""
        if not data:
            self._finish()
            return
        self._taken += len(data)
        logged = self._log.write(self._splitter.feed(data, time.time_ns()))  # first: what a client has seen is in the log
        for outlet in list(self._outlets):
            if not outlet.write(data):
                self._outlets.remove(outlet)
                outlet.end()
        if not logged or any(outlet.full for outlet in self._outlets):
            self._loop.unwatch(self.fd)
        if not logged:
            self._retry()

    def _finish(self) -> None:
        """The writers are gone: the unterminated tail, then the end, once the log has all of it."""
        if not self._log.write(self._splitter.end(time.time_ns())):
            self._loop.unwatch(self.fd)
            self._retry()
            return
        self.close()
        self._on_end(self)

    def _resume(self) -> None:
        if self.fd >= 0 and not self._log.blocked and not any(outlet.full for outlet in self._outlets):
            self._loop.watch(self.fd, self._readable)

    def _retry(self) -> None:
        """The disk may have room again."""
        if not self._retrying:
            self._retrying = True
            self._loop.later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retrying = False
        if self.fd < 0:
            return
        if self._log.write(b""):
            self._resume()
        else:
            self._retry()


class Input:
    """A container's standard input or terminal: bytes of attached clients, in the order in which they come. Owns the descriptor."""

    def __init__(self, loop: Loop, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._loop = loop
        self._unwritten = b""
        self._sources: dict[int, bool] = {}  # descriptor → whether its end is the input's

    def feed(self, source: int, *, last: bool) -> None:
        """Pass `source` (ours from here) on until it ends; `last`: then the input ends too."""
        os.set_blocking(source, False)
        self._sources[source] = last
        if not self._unwritten:
            self._loop.watch(source, lambda: self._readable(source))

    def close(self) -> None:
        for source in list(self._sources):
            self._drop(source)
        if self.fd >= 0:
            self._loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1

    def _readable(self, source: int) -> None:
        try:
            data = os.read(source, READ)
        except BlockingIOError:
            return
        if data:
            self._write(data)
        elif self._sources[source]:
            self.close()
        else:
            self._drop(source)

    def _write(self, data: bytes) -> None:
        self._unwritten += data
        try:
            self._unwritten = self._unwritten[os.write(self.fd, self._unwritten) :]
        except BlockingIOError:
            pass  # watched below until there is room
        except OSError:  # EPIPE, EIO: nobody reads it any more
            self._unwritten = b""
            self.close()
            return
        if self._unwritten:
            for source in self._sources:
                self._loop.unwatch(source)
            self._loop.watch(self.fd, self._room, write=True)

    def _room(self) -> None:
        self._loop.unwatch(self.fd)
        self._write(b"")
        if self._unwritten:
            return
        for source in self._sources:
            self._loop.watch(source, lambda source=source: self._readable(source))  # type: ignore[misc]  # binds this round's value

    def _drop(self, source: int) -> None:
        self._loop.unwatch(source)
        del self._sources[source]
        os.close(source)
