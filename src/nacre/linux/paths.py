"""Paths that cannot escape: everything below a root is reached through openat2(2), whatever links the container left there."""

from __future__ import annotations

import errno
import os

from nacre.linux import cdata
from nacre.linux.flags import Flags
from nacre.linux.libc import AT_FDCWD, Int, SyscallError, VoidP, bind, owned, syscall


class Resolve(Flags):
    """openat2(2), `struct open_how.resolve`."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10
    CACHED = 0x20


class _OpenHow(cdata.Structure):
    _fields_ = [("flags", cdata.c_uint64), ("mode", cdata.c_uint64), ("resolve", cdata.c_uint64)]


_IN_ROOT = Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
_MOST_LINKS = 40  # as the kernel's own walk


def openat2(directory: int, path: str, flags: int, mode: int = 0, resolve: Resolve = _IN_ROOT) -> int:
    """Open `path` seen from descriptor `directory`; the caller owns the result. Raises SyscallError naming the path.

    EAGAIN (a rename raced with "..") is retried a few times, as the manual asks.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for attempt in range(32):
        try:
            return syscall("openat2", directory, os.fsencode(path), cdata.byref(how), cdata.sizeof(how), path=path)
        except SyscallError as error:
            if error.errno != errno.EAGAIN or attempt == 31:
                raise
    raise AssertionError("unreachable")


def open_root(path: str) -> int:
    """An O_PATH descriptor of directory `path`, to be a root for the functions below."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def open_in(root: int, path: str, flags: int = os.O_PATH, mode: int = 0) -> int:
    """Open `path` as if `root` were "/": links and ".." stay inside."""
    return openat2(root, path, flags, mode)


def make_directories_in(root: int, path: str, mode: int = 0o755) -> int:
    """Make what is missing of directory `path` below `root`; answers an O_PATH descriptor of it.

    Links on the way are followed inside the root, and where one leads to nothing that is made. A file on the way is ENOTDIR.
    """
    return _make_directories(root, path, mode, _MOST_LINKS)


def _make_directories(root: int, path: str, mode: int, links: int) -> int:
    try:
        return open_in(root, path, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    done = "/"
    current = os.dup(root)
    os.set_inheritable(current, False)
    for part in path.split("/"):
        if part in ("", "."):
            continue
        done = os.path.join(done, part)
        try:
            following = open_in(root, done, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if error.errno != errno.ENOENT:
                os.close(current)
                raise
            try:
                following = _make_directory(root, current, done, mode, links)
            except OSError:
                os.close(current)
                raise
        os.close(current)
        current = following
    return current


def _make_directory(root: int, parent: int, path: str, mode: int, links: int) -> int:
    """The last part of `path`, which is missing in `parent` or a link that leads to nothing."""
    name = os.path.basename(path)
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        if links == 0:
            raise SyscallError("openat2", errno.ELOOP, path) from None
        return _make_directories(root, _link_target(parent, path), mode, links - 1)
    return open_in(root, path, os.O_PATH | os.O_DIRECTORY)


def _link_target(parent: int, path: str) -> str:
    return os.path.join(os.path.dirname(path), os.readlink(os.path.basename(path), dir_fd=parent))


def make_file_in(root: int, path: str, mode: int = 0o644) -> int:
    """Make file `path` below `root`, with its directories, unless it is there; answers an O_PATH descriptor of it.

    A link that leads to nothing (images have such resolv.conf) gets what it leads to, inside the root.
    """
    for _ in range(_MOST_LINKS):
        try:
            return open_in(root, path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        head, name = os.path.split(path.rstrip("/"))
        with owned(make_directories_in(root, head or "/")) as directory:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                os.close(os.open(name, flags, mode, dir_fd=directory))
            except FileExistsError:
                path = _link_target(directory, path)
    raise SyscallError("openat2", errno.ELOOP, path)


def read_in(root: int, path: str, limit: int = 1 << 20) -> bytes:
    """The first `limit` bytes of regular file `path` below `root`."""
    fd = openat2(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


_PROC_SUPER_MAGIC = 0x9FA0
_fstatfs = bind("fstatfs", Int, VoidP)


def open_own_proc(name: str, flags: int) -> int:
    """File `name` of this process in /proc, which a container may have furnished: it must be proc itself, uncovered and without links.

    Raises OSError (EXDEV, ELOOP), or EBADF where /proc is no proc (CVE-2025-52881).
    """
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = (cdata.c_long * 32)()
        _fstatfs(proc, cdata.addressof(found))
        if found[0] != _PROC_SUPER_MAGIC:
            raise SyscallError("fstatfs", errno.EBADF, "/proc")
        return openat2(proc, f"{os.getpid()}/{name}", flags, resolve=Resolve.BENEATH | Resolve.NO_XDEV | Resolve.NO_SYMLINKS)
    finally:
        os.close(proc)


def magic(fd: int) -> str:
    """The name under which calls that only take paths reach descriptor `fd`; needs the host's /proc."""
    return f"/proc/self/fd/{fd}"


__all__ = [
    "AT_FDCWD",
    "Resolve",
    "magic",
    "make_directories_in",
    "make_file_in",
    "open_in",
    "open_own_proc",
    "open_root",
    "openat2",
    "read_in",
]
