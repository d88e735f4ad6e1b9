"""Memory files: a sealed one cannot change any more, whoever is given it. memfd_create(2), fcntl(2) "File Sealing"."""

from __future__ import annotations

import fcntl
import os

from nacre.linux.flags import Flags


class Seal(Flags):
    SEAL = 1
    SHRINK = 2
    GROW = 4
    WRITE = 8


IMMUTABLE = Seal.SEAL | Seal.SHRINK | Seal.GROW | Seal.WRITE


def seal(fd: int, seals: Seal = IMMUTABLE) -> None:
    """Add `seals`; EBUSY while somebody maps it writable."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, int(seals))


def sealed(name: str, source: int) -> int:
    """A write-sealed memory file with the content of the open file `source` (read from its start); the caller owns it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        offset, size = 0, os.fstat(source).st_size
        while offset < size:
            sent = os.sendfile(fd, source, offset, size - offset)
            if sent == 0:
                break
            offset += sent
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def from_bytes(name: str, data: bytes, *, immutable: bool = False) -> int:
    """A memory file holding `data`, positioned at its start; the caller owns it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    if immutable:
        seal(fd)
    return fd
