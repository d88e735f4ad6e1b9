"""An erofs image of one block: what the rehearsal's container stands on, so that a pod's image is not the first that a guest mounts.

It has the directories that every image has, as mounting on those of an image is another path through the kernel than making them.
On-disk format: fs/erofs/erofs_fs.h. The block of 4 KiB holds the super block, and each inode with its data directly behind it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

UUID = "6e616372-6500-4000-8000-7265686561ff"
_TREE: Mapping[str, object] = {"dev": {}, "etc": {"passwd": b"root:x:0:0::/:/bin/sh\n"}, "proc": {}, "sys": {}}
_BLOCK, _PLACE = 4096, 32  # a nid counts places of 32 bytes
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sI")  # as far as feature_incompat; 128 bytes in all
_SUPER_AT, _SUPER_SIZE, _MAGIC = 1024, 128, 0xE0F5E1E2
_INODE = struct.Struct("<HHHHIIIIHHI")  # struct erofs_inode_compact
_INLINE = 2 << 1  # i_format: compact, its data directly behind it
_ENTRY = struct.Struct("<QHBB")  # struct erofs_dirent: nid, nameoff, file_type
_FILE, _DIRECTORY = 1, 2  # EROFS_FT_REG_FILE, EROFS_FT_DIR


def image() -> bytes:
    block = bytearray(_SUPER_AT + _SUPER_SIZE)
    root = _put_directory(block, _TREE, None)
    facts = (_MAGIC, 0, 0, 12, 0, root, _nodes(_TREE) + 1, 0, 0, 1, 0, 0)
    _SUPER.pack_into(block, _SUPER_AT, *facts, bytes.fromhex(UUID.replace("-", "")), b"rehearsal", 0)
    return bytes(block).ljust(_BLOCK, b"\0")


def _nodes(tree: Mapping[str, object]) -> int:
    return sum(1 + (_nodes(one) if isinstance(one, Mapping) else 0) for one in tree.values())


def _put_directory(block: bytearray, tree: Mapping[str, object], parent: int | None) -> int:
    """The directory with all below it; answers its nid. Its own place is taken first, as what is below names it."""
    names = sorted([".", "..", *tree], key=str.encode)
    size = sum(_ENTRY.size + len(name) for name in names)
    nid = _take(block, size)
    found = {".": (nid, _DIRECTORY), "..": (nid if parent is None else parent, _DIRECTORY)}
    for name, one in tree.items():
        if isinstance(one, Mapping):
            found[name] = _put_directory(block, one, nid), _DIRECTORY
        else:
            assert isinstance(one, bytes)
            found[name] = _take(block, len(one)), _FILE
            _fill(block, found[name][0], 0o100644, 1, one)
    offset, entries = len(names) * _ENTRY.size, b""
    for name in names:
        entries += _ENTRY.pack(found[name][0], offset, found[name][1], 0)
        offset += len(name)
    _fill(block, nid, 0o40755, 2 + sum(isinstance(one, Mapping) for one in tree.values()), entries + "".join(names).encode())
    return nid


def _take(block: bytearray, size: int) -> int:
    """Room for an inode and `size` bytes behind it."""
    nid = len(block) // _PLACE
    block += bytes(-(-(_INODE.size + size) // _PLACE) * _PLACE)
    return nid


def _fill(block: bytearray, nid: int, mode: int, links: int, data: bytes) -> None:
    at = nid * _PLACE
    _INODE.pack_into(block, at, _INLINE, 0, mode, links, len(data), 0, 0, nid, 0, 0, 0)
    block[at + _INODE.size : at + _INODE.size + len(data)] = data


def opened() -> int:
    """A memory file with it, read-only; the caller owns the descriptor."""
    written = os.memfd_create("nacre-rehearsal", os.MFD_CLOEXEC)
    try:
        os.write(written, image())
        return os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(written)
