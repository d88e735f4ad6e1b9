"""An erofs image of one block with an empty root: what the rehearsal's container stands on, so that a pod's image is not a guest's first.

On-disk format: fs/erofs/erofs_fs.h. One block of 4 KiB holds the super block, the root's inode and, behind it, the root's entries.
"""

from __future__ import annotations

import os
import struct

UUID = "6e616372-6500-4000-8000-7265686561ff"
_BLOCK = 4096
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sI")  # as far as feature_incompat; 128 bytes in all
_SUPER_AT, _SUPER_SIZE, _MAGIC = 1024, 128, 0xE0F5E1E2
_INODE = struct.Struct("<HHHHIIIIHHI")  # struct erofs_inode_compact
_INLINE = 2 << 1  # i_format: compact, its data directly behind it
_ENTRY = struct.Struct("<QHBB")  # struct erofs_dirent: nid, nameoff, file_type
_DIRECTORY = 2  # EROFS_FT_DIR


def image() -> bytes:
    at = _SUPER_AT + _SUPER_SIZE
    root = at // 32  # a nid counts places of 32 bytes
    names = [b".", b".."]
    offsets = [len(names) * _ENTRY.size + sum(map(len, names[:index])) for index in range(len(names))]
    entries = b"".join(_ENTRY.pack(root, offset, _DIRECTORY, 0) for offset in offsets) + b"".join(names)
    super_block = _SUPER.pack(
        *(_MAGIC, 0, 0, 12, 0, root, 1, 0, 0, 1, 0, 0), bytes.fromhex(UUID.replace("-", "")), b"rehearsal", 0
    )
    inode = _INODE.pack(_INLINE, 0, 0o40755, 2, len(entries), 0, 0, 1, 0, 0, 0)
    block = bytes(_SUPER_AT) + super_block.ljust(_SUPER_SIZE, b"\0") + inode + entries
    return block.ljust(_BLOCK, b"\0")


def opened() -> int:
    """A memory file with it, read-only; the caller owns the descriptor."""
    written = os.memfd_create("nacre-rehearsal", os.MFD_CLOEXEC)
    try:
        os.write(written, image())
        return os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(written)
