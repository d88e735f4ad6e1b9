"""What a container says: from its pipes or terminal into the CRI log, and to whoever is attached.

A log line is `RFC3339Nano stdout|stderr P|F BYTES` (the kubelet's CRI logging format): a line of more than CHUNK bytes is cut into
P…F, an unterminated tail is written as P when the stream ends. A log that cannot be written is not read past: the pipe fills, the
container waits, and `blocked` says why; nothing is dropped. The next successful write (a `reopen`) takes it up again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from nacre.shim.loop import Loop

CHUNK = 16 * 1024  # bytes of a log line
READ = 64 * 1024


class Log:
    """One container's log file; `path` empty: what it says goes nowhere but to attached clients."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.blocked = ""  # the errno's words while it cannot be written
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
            self.blocked, self._unwritten = error.strerror or str(error), data
            return False
        self._unwritten = data[written:]
        self.blocked = "" if not self._unwritten else "short write"
        return not self._unwritten or self.write(b"")

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


class Stream:
    """One descriptor that a container writes to. Owns it; `on_end` is called once, when it is closed and all is in the log."""

    def __init__(self, loop: Loop, fd: int, name: str, log: Log, on_end: Callable[[Stream], None]) -> None:
        self.fd, self.name = fd, name
        self.attached: list[
            int
        ] = []  # descriptors of attached clients; a slow one is left out of nothing, it slows the container
        self._loop, self._log, self._on_end = loop, log, on_end
        self._splitter = Splitter(name)
        self._taken = 0  # bytes read so far
        os.set_blocking(fd, False)
        loop.watch(fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self.fd, READ)
        except BlockingIOError:
            return
        except OSError:  # EIO: a terminal whose last slave was closed
            data = b""
        if data:
            self._taken += len(data)
            for client in list(self.attached):
                self._pass_on(client, data)
            if not self._log.write(self._splitter.feed(data, time.time_ns())):
                self._loop.unwatch(self.fd)
            return
        self._log.write(self._splitter.end(time.time_ns()))
        self.close()
        self._on_end(self)

    def drain(self) -> None:
        """Take what lies in the pipe now, as its writer has ended; whoever else holds it open is not waited for."""
        before = -1
        while self.fd >= 0 and not self._log.blocked and before != self._taken:
            before = self._taken
            self._readable()

    def resume(self) -> None:
        """The log takes bytes again."""
        if self.fd >= 0 and self._log.write(b""):
            self._loop.watch(self.fd, self._readable)

    def close(self) -> None:
        if self.fd >= 0:
            self._loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1
        for client in self.attached:
            os.close(client)
        self.attached.clear()

    def _pass_on(self, client: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(client, view) :]
        except OSError:  # the client left
            self.attached.remove(client)
            os.close(client)
