"""Mounts: the calls of mount(2) and of the new mount API, flags as families. Targets are descriptors wherever the kernel allows."""

from __future__ import annotations

import errno
import os

from nacre.linux import cdata
from nacre.linux.flags import Flags
from nacre.linux.libc import AT_EMPTY_PATH, AT_FDCWD, AT_RECURSIVE, CharP, Int, SyscallError, ULong, bind, syscall


class MountFlag(Flags):
    """mount(2), `mountflags`."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    REMOUNT = 32
    MANDLOCK = 64
    DIRSYNC = 128
    NOSYMFOLLOW = 256
    NOATIME = 1024
    NODIRATIME = 2048
    BIND = 4096
    MOVE = 8192
    REC = 16384
    SILENT = 32768
    UNBINDABLE = 1 << 17
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20
    RELATIME = 1 << 21
    I_VERSION = 1 << 23
    STRICTATIME = 1 << 24
    LAZYTIME = 1 << 25


PROPAGATION = MountFlag.UNBINDABLE | MountFlag.PRIVATE | MountFlag.SLAVE | MountFlag.SHARED


class UnmountFlag(Flags):
    """umount2(2)."""

    FORCE = 1
    DETACH = 2
    EXPIRE = 4
    NOFOLLOW = 8


class MountAttr(Flags):
    """mount_setattr(2), `attr_set` and `attr_clr`."""

    RDONLY = 0x01
    NOSUID = 0x02
    NODEV = 0x04
    NOEXEC = 0x08
    NOATIME = 0x10
    STRICTATIME = 0x20
    ATIME = 0x70  # the whole field: must be cleared as one
    NODIRATIME = 0x80
    IDMAP = 0x100000
    NOSYMFOLLOW = 0x200000


class OpenTree(Flags):
    CLONE = 1
    RECURSIVE = AT_RECURSIVE
    EMPTY_PATH = AT_EMPTY_PATH


class _Attr(cdata.Structure):
    _fields_ = [
        ("attr_set", cdata.c_uint64),
        ("attr_clr", cdata.c_uint64),
        ("propagation", cdata.c_uint64),
        ("userns_fd", cdata.c_uint64),
    ]


_mount = bind("mount", CharP, CharP, CharP, ULong, CharP, path=1)
_umount2 = bind("umount2", CharP, Int, path=0)
_MOVE_EMPTY = 0x04 | 0x40  # MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Raises SyscallError naming the target."""
    _mount(_encode(source), os.fsencode(target), _encode(fstype), flags, _encode(data))


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2). Raises SyscallError naming the target."""
    _umount2(os.fsencode(target), flags)


def open_tree(directory: int, path: str, flags: OpenTree) -> int:
    """A descriptor of a mount, or with CLONE of a detached copy of it; the caller owns it, and closing drops the copy."""
    return syscall("open_tree", directory, os.fsencode(path), int(flags) | os.O_CLOEXEC, path=path or None)


def move_mount(tree: int, target: int, path: str = "") -> None:
    """Attach the detached tree `tree` on what descriptor `target` (or `path` below it) shows."""
    flags = _MOVE_EMPTY if not path else 0x04
    syscall("move_mount", tree, b"", target, os.fsencode(path), flags, path=path or None)


def mount_setattr(
    fd: int,
    *,
    attr_set: int = 0,
    attr_clear: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
    recursive: bool = False,
) -> None:
    """mount_setattr(2) on the mount that descriptor `fd` is in. ENOSYS before Linux 5.12."""
    attr = _Attr(attr_set, attr_clear, propagation, userns_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall("mount_setattr", fd, b"", flags, cdata.byref(attr), cdata.sizeof(attr))


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2); with "." twice the old root is left stacked on the new one, to be unmounted there."""
    syscall("pivot_root", os.fsencode(new), os.fsencode(old), path=new)


def bind_tree(source: str, *, recursive: bool, directory: int = AT_FDCWD) -> int:
    """A detached copy of the mount at `source` ("" with a `directory` descriptor: that very object), owned by the caller."""
    flags = OpenTree.CLONE
    if recursive:
        flags |= OpenTree.RECURSIVE
    if not source:
        flags |= OpenTree.EMPTY_PATH
    return open_tree(directory, source, flags)


def unmount_all(path: str) -> bool:
    """Take away every mount stacked at `path`, lazily; answers whether there was one. A missing path is nothing mounted."""
    seen = False
    while True:
        try:
            umount2(path, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW)
            seen = True
        except SyscallError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return seen
            raise


def _encode(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)
