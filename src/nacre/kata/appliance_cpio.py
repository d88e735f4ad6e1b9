"""The cpio archive that a kernel unpacks as its first root (format newc, Documentation/driver-api/early-userspace/buffer-format.rst).

Writes only what an appliance needs, every time the same bytes for the same entries: no owner but root, no time but zero.
"""

from __future__ import annotations

import stat
from typing import BinaryIO


class Archive:
    """An archive being written to `file`. Parent directories must be added first; `close` ends it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inode = 0
        self._size = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._entry(path, stat.S_IFDIR | mode)

    def regular(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def close(self) -> None:
        """The trailer; the file stays open."""
        self._entry("TRAILER!!!", 0)
        self._write(b"\0" * (-self._size % 512))

    def _entry(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.strip("/").encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # ino, mode, uid, gid, nlink, mtime, filesize, device of the archive's file system, device of the node, name's size, checksum
        numbers = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        self._write(b"070701" + b"".join(b"%08X" % number for number in numbers) + name)
        self._pad()
        self._write(data)
        self._pad()

    def _pad(self) -> None:
        self._write(b"\0" * (-self._size % 4))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)
