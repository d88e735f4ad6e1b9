"""Layer streams: gzip, zstd or plain, told apart by their first bytes, decompressed piece by piece within bounded memory.

The bytes are hostile: a piece never grows beyond what was asked for, and a zstd frame may not ask for a window above 128 MiB.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import BinaryIO

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte of 0x50 to 0x5f
_INPUT = 1 << 16
_WINDOW = 128 << 20


class StreamError(ValueError):
    """The compressed stream is broken or cut short."""


class _Gzip:
    """A gzip file of one or more members, RFC 1952."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._member = zlib.decompressobj(31)
        self._pending = b""
        self._inside = False  # a member has begun

    def read(self, size: int) -> bytes:
        while True:
            if not self._pending:
                self._pending = self._file.read(_INPUT)
                if not self._pending:
                    if self._inside and not self._member.eof:
                        raise StreamError("the gzip stream ends too early")
                    return b""
            if self._member.eof:
                if not self._pending.strip(b"\0"):
                    self._pending = b""  # padding after the last member
                    continue
                self._member = zlib.decompressobj(31)
            self._inside = True
            try:
                piece = self._member.decompress(self._pending, size)
            except zlib.error as error:
                raise StreamError(f"the gzip stream is broken: {error}") from error
            self._pending = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if piece:
                return piece


class _Zstd:
    """zstd frames, RFC 8878. A stream cut short reads as one that ends: the archive in it, or its digest, tells."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(file, read_across_frames=True)

    def read(self, size: int) -> bytes:
        try:
            return self._reader.read(size)
        except self._error as error:
            raise StreamError(f"the zstd stream is broken: {error}") from error


def decompressed(file: BinaryIO) -> _Gzip | _Zstd | BinaryIO:
    """A source of the plain bytes of `file`, which must be seekable and at its start."""
    head = file.read(4)
    file.seek(0)
    if head.startswith(_GZIP):
        return _Gzip(file)
    if head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F):
        return _Zstd(file)
    return file


class Hashed:
    """A source that keeps the sha256 and the length of all that was read through it."""

    def __init__(self, source: _Gzip | _Zstd | BinaryIO, limit: int) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self._limit = limit
        self.size = 0

    def read(self, size: int) -> bytes:
        piece = self._source.read(size)
        self._hash.update(piece)
        self.size += len(piece)
        if self.size > self._limit:
            raise StreamError(f"it unpacks to more than {self._limit >> 20} MiB")
        return piece

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()
