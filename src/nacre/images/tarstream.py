"""tar, decoded from a stream that may be hostile: ustar, GNU and pax headers, sparse files. Knows nothing of layers.

A Reader yields entries in order; `Reader.data()` streams the current entry's bytes. Every size that the archive claims is held
against a limit before memory is taken for it, and every departure from the format is a TarError that names the entry.
Formats: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Storing Sparse Files".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

BLOCK = 512
PAX_LIMIT = 1 << 20  # bytes of one extended header
NAME_LIMIT = 4096
SPARSE_LIMIT = 65536  # fragments of one file
_PIECE = 1 << 18
_NUL = b"\0" * BLOCK
_LARGEST = 1 << 62


class Kind(StrEnum):
    """What an entry makes, in the words of messages."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


_KINDS = {
    b"\0": Kind.FILE,
    b"0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


class TarError(ValueError):
    """The archive is broken: `entry` is the name of the entry it was met in, or of the one before."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(f"{entry!r}: {reason}")
        self.entry = entry
        self.reason = reason


class Source(Protocol):
    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; b"" at the end."""


@dataclass(slots=True, kw_only=True)
class Entry:
    """One member, as its headers say; nothing is checked beyond the format."""

    name: str  # undecodable bytes as surrogates, as os.fsdecode makes them
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int  # of the file it makes; `stored` bytes of it are in the archive
    stored: int
    mtime_ns: int
    target: str = ""  # of links
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    sparse: tuple[tuple[int, int], ...] | None = None  # (offset, length) of the stored fragments


class Reader:
    """Iterate for entries; call `data` at most once for each. Raises TarError; what the source raises passes through."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rest = 0  # unread bytes of the current entry, padding included
        self._entry: Entry | None = None
        self._last = "(start)"
        self._global: dict[str, str] = {}

    def __iter__(self) -> Iterator[Entry]:
        while True:
            entry = self._next()
            if entry is None:
                return
            self._last, self._entry = entry.name, entry
            yield entry
            self._skip()

    def data(self) -> Iterator[tuple[int, bytes]]:
        """(offset in the file, bytes) of the current entry, in order; holes of sparse files are left out."""
        entry = self._entry
        assert entry is not None
        for start, length in ((0, entry.stored),) if entry.sparse is None else entry.sparse:
            done = 0
            while done < length:
                piece = self._source.read(min(_PIECE, length - done))
                if not piece:
                    raise TarError(entry.name, f"the archive ends {length - done} bytes before the entry does")
                self._rest -= len(piece)
                yield start + done, piece
                done += len(piece)

    def drain(self) -> None:
        """Read what follows the archive's end mark, so that a digest over the source covers all of it."""
        while self._source.read(_PIECE):
            pass

    def _next(self) -> Entry | None:
        pax: dict[str, str] = {}
        fragments: list[tuple[str, str]] = []
        name = target = None
        while True:
            header = self._header()
            if header is None:
                return None
            kind = header[156:157]
            if kind == b"x":
                pax, fragments = self._pax(header)
            elif kind == b"g":
                self._global |= self._pax(header)[0]
            elif kind == b"L":
                name = self._long(header)
            elif kind == b"K":
                target = self._long(header)
            else:
                break
        return self._build(header, {**self._global, **pax}, fragments, name, target)

    def _header(self) -> bytes | None:
        """The next header block, its checksum right; None at the end mark or where the archive simply stops."""
        block = self._source.read(BLOCK)
        while 0 < len(block) < BLOCK:
            more = self._source.read(BLOCK - len(block))
            if not more:
                raise TarError(self._last, "the archive ends inside the next header")
            block += more
        if not block or block == _NUL:
            return None
        said = self._number(block[148:156], "checksum")
        if sum(block) - sum(block[148:156]) + 8 * 32 != said and _signed_sum(block) != said:
            raise TarError(self._last, "the header after this entry has a wrong checksum")
        return block

    def _build(
        self, header: bytes, pax: dict[str, str], fragments: list[tuple[str, str]], name: str | None, target: str | None
    ) -> Entry:
        name = self._name(header, pax, name)
        kind = _KINDS.get(header[156:157])
        if kind is None:
            raise TarError(name, f"entry type {header[156:157]!r} is not one that makes a file")
        self._last = name
        if kind is Kind.FILE and name.endswith("/") and header[156:157] != b"S":
            kind = Kind.DIRECTORY  # as tar wrote directories before there was a type for them
        size = self._whole(pax, "size", header[124:136])
        stored = size if kind is Kind.FILE else 0
        entry = Entry(
            name=name,
            kind=kind,
            mode=self._number(header[100:108], "mode") & 0o7777,
            uid=self._whole(pax, "uid", header[108:116]),
            gid=self._whole(pax, "gid", header[116:124]),
            size=stored,
            stored=stored,
            mtime_ns=self._mtime(pax, header),
            target=pax.get("linkpath") or target or _text(header[157:257]),
            device=self._device(header) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0),
            xattrs={
                key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
                for key, value in pax.items()
                if key.startswith("SCHILY.xattr.")
            },
        )
        self._rest = stored + -stored % BLOCK
        if kind is Kind.FILE:
            self._sparse(entry, header, pax, fragments)
        if "\0" in entry.name or "\0" in entry.target:
            raise TarError(name, "a name has a NUL byte in it")
        if max(len(entry.name), len(entry.target)) > NAME_LIMIT:
            raise TarError(name[:100], f"a name is longer than {NAME_LIMIT} characters")
        return entry

    def _name(self, header: bytes, pax: dict[str, str], long: str | None) -> str:
        if "GNU.sparse.name" in pax:
            return pax["GNU.sparse.name"]
        if pax.get("path"):
            return pax["path"]
        if long is not None:
            return long
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
            return f"{_text(header[345:500])}/{name}"
        return name

    def _mtime(self, pax: dict[str, str], header: bytes) -> int:
        text = pax.get("mtime")
        if not text:
            return min(self._number(header[136:148], "mtime", signed=True), 1 << 33) * 10**9
        whole, _, part = text.partition(".")
        try:
            seconds, nanoseconds = int(whole or "0"), int((part + "0" * 9)[:9])
        except ValueError:
            raise TarError(self._last, f"mtime {text[:40]!r} is no number") from None
        if abs(seconds) > 1 << 33:
            raise TarError(self._last, f"mtime {seconds} is out of range")
        return seconds * 10**9 + (-nanoseconds if whole.startswith("-") else nanoseconds)

    def _device(self, header: bytes) -> tuple[int, int]:
        return self._number(header[329:337], "device major"), self._number(header[337:345], "device minor")

    def _whole(self, pax: dict[str, str], key: str, octal: bytes) -> int:
        text = pax.get(key)
        if not text:
            return self._number(octal, key)
        if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) > _LARGEST:
            raise TarError(self._last, f"{key} {text[:40]!r} is out of range")
        return int(text)

    def _number(self, data: bytes, what: str, *, signed: bool = False) -> int:
        """A header's number: octal, or GNU's base 256 for large ones."""
        if data[0] & 0x80:
            value = int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
            if data[0] & 0x40:
                value -= 1 << (8 * len(data) - 1)
        else:
            text = data.split(b"\0", 1)[0].strip()
            try:
                value = int(text, 8) if text else 0
            except ValueError:
                raise TarError(self._last, f"{what} {data!r} is no number") from None
        if (value < 0 and not signed) or abs(value) > _LARGEST:
            raise TarError(self._last, f"{what} {value} is out of range")
        return value

    def _long(self, header: bytes) -> str:
        size = self._number(header[124:136], "size")
        if size > NAME_LIMIT + 1:
            raise TarError(self._last, f"a name of {size} bytes follows, the limit is {NAME_LIMIT}")
        return _text(self._block_data(size))

    def _pax(self, header: bytes) -> tuple[dict[str, str], list[tuple[str, str]]]:
        """Records of one extended header, and those of sparse format 0.0, which repeats its keys."""
        size = self._number(header[124:136], "size")
        if size > PAX_LIMIT:
            raise TarError(self._last, f"an extended header of {size} bytes follows, the limit is {PAX_LIMIT}")
        data, at = self._block_data(size), 0
        records: dict[str, str] = {}
        repeated: list[tuple[str, str]] = []
        while at < size and data[at] != 0:
            space = data.find(b" ", at, at + 10)
            try:
                end = at + int(data[at:space])
            except ValueError:
                end = 0
            key, equals, value = data[space + 1 : max(end - 1, 0)].partition(b"=")
            if space < 0 or end <= space + 1 or end > size or data[end - 1 : end] != b"\n" or not equals:
                raise TarError(self._last, "the extended header after this entry is malformed")
            name, text = key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")
            if name in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
                repeated.append((name, text))
            records[name] = text
            at = end
        return records, repeated

    def _block_data(self, size: int) -> bytes:
        padded = size + -size % BLOCK
        data = b""
        while len(data) < padded:
            piece = self._source.read(padded - len(data))
            if not piece:
                raise TarError(self._last, "the archive ends inside an extended header")
            data += piece
        return data[:size]

    def _sparse(self, entry: Entry, header: bytes, pax: dict[str, str], fragments: list[tuple[str, str]]) -> None:
        """Fill in `sparse`, the true size, and what of the stored bytes is map and not data."""
        if header[156:157] == b"S":
            numbers, more = [header[386 + 12 * i : 398 + 12 * i] for i in range(8)], header[482] != 0
            entry.size = self._number(header[483:495], "real size")
            while more:
                block = self._block_data(BLOCK)
                numbers += [block[12 * i : 12 * i + 12] for i in range(42)]
                more = block[504] != 0
                if len(numbers) > 2 * SPARSE_LIMIT:
                    raise TarError(entry.name, f"more than {SPARSE_LIMIT} fragments")
            values = [self._number(data, "sparse map") for data in numbers if data.strip(b"\0 ")]
        elif pax.get("GNU.sparse.major") == "1":
            entry.size = self._decimal(pax.get("GNU.sparse.realsize", ""))
            values = self._map_in_data(entry)
        elif "GNU.sparse.map" in pax or fragments:
            entry.size = self._decimal(pax.get("GNU.sparse.size", ""))
            words = pax["GNU.sparse.map"].split(",") if "GNU.sparse.map" in pax else [value for _, value in fragments]
            values = [self._decimal(word) for word in words if word]
        else:
            return
        entry.sparse = tuple(zip(values[::2], values[1::2], strict=False))
        self._check_map(entry, len(values))

    def _map_in_data(self, entry: Entry) -> list[int]:
        """Sparse format 1.0: the map is the head of the data, decimal numbers a line each, padded to a block."""
        text, wanted = b"", 1
        while text.count(b"\n") < wanted:
            if self._rest < BLOCK or len(text) > 44 * SPARSE_LIMIT:
                raise TarError(entry.name, "its sparse map does not end")
            text += self._block_data(BLOCK)
            self._rest -= BLOCK
            entry.stored -= BLOCK
            lines = text.split(b"\n")
            if len(lines) > 1:
                wanted = 1 + 2 * self._decimal(lines[0].decode("latin-1"))
                if wanted > 2 * SPARSE_LIMIT:
                    raise TarError(entry.name, f"more than {SPARSE_LIMIT} fragments")
        return [self._decimal(line.decode("latin-1")) for line in text.split(b"\n")[1:wanted]]

    def _decimal(self, text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) > _LARGEST:
            raise TarError(self._last, f"sparse map has {text[:40]!r} where a number belongs")
        return int(text)

    def _check_map(self, entry: Entry, count: int) -> None:
        end = total = 0
        for offset, length in entry.sparse or ():
            if offset < end or offset + length > entry.size:
                raise TarError(entry.name, "its sparse map overlaps itself or passes the file's end")
            end, total = offset + length, total + length
        if count % 2 or total != max(entry.stored, 0) or len(entry.sparse or ()) > SPARSE_LIMIT:
            raise TarError(entry.name, "its sparse map does not fit its data")

    def _skip(self) -> None:
        while self._rest > 0:
            piece = self._source.read(min(_PIECE, self._rest))
            if not piece:
                raise TarError(self._last, "the archive ends inside this entry")
            self._rest -= len(piece)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _signed_sum(block: bytes) -> int:
    """The checksum as some old tars made it, with signed bytes."""
    return sum(b - 256 if b > 127 else b for b in block[:148] + block[156:]) + 8 * 32
