"""One container as its shim holds it: log, output streams, input, and how far it has come."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Callable
from contextlib import ExitStack

from nacre.oci.handler import Exit, Stdio
from nacre.shim.loop import Loop
from nacre.shim.streams import Input, Log, Stream


class Held:
    """Owns its descriptors until `close`."""

    def __init__(self, loop: Loop, log_path: str, on_blocked: Callable[[str], None], *, tty: bool) -> None:
        self._loop = loop
        self.log = Log(log_path, on_blocked)
        self.tty = tty
        self.pid = 0
        self.started_ns = 0  # Unix time, 0 for not yet
        self.end: Exit | None = None
        self.streams: list[Stream] = []
        self.input: Input | None = None

    def pipes(self, *, stdin: bool) -> Stdio:
        """The container's ends of new pipes, the handler's to close; ours are read from now on."""
        with ExitStack() as undo:
            ends = {name: os.pipe2(os.O_CLOEXEC) for name in ("stdout", "stderr", *(("stdin",) if stdin else ()))}
            for pair in ends.values():
                for fd in pair:
                    undo.callback(os.close, fd)
            for name in ("stdout", "stderr"):
                self.streams.append(Stream(self._loop, ends[name][0], name, self.log, self.streams.remove))
            if stdin:
                self.input = Input(self._loop, ends["stdin"][1])
            undo.pop_all()
        return Stdio(stdin=ends["stdin"][0] if stdin else None, stdout=ends["stdout"][1], stderr=ends["stderr"][1])

    def console(self, fd: int) -> None:
        """The terminal's master, ours from here: output and input at once."""
        self.streams.append(Stream(self._loop, fd, "stdout", self.log, self.streams.remove))
        self.input = Input(self._loop, os.dup(fd))

    def resize(self, width: int, height: int) -> bool:
        """False when there is no terminal of the host's to resize."""
        if self.input is None or self.input.fd < 0 or not os.isatty(self.input.fd):
            return False
        fcntl.ioctl(self.input.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        return True

    def drain(self) -> None:
        for stream in list(self.streams):
            stream.drain()

    def close(self) -> None:
        for stream in list(self.streams):
            stream.drain()
            stream.close()
        self.streams.clear()
        if self.input is not None:
            self.input.close()
        self.log.close()
