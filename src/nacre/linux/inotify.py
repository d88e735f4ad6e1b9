"""inotify(7): told of changes of files and directories. One instance serves a whole process, as a user has few of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import IntFlag

from nacre.linux.libc import CharP, Int, UInt, bind

IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_HEADER = struct.Struct("iIII")  # wd, mask, cookie, length of the name


class Mask(IntFlag):
    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    Q_OVERFLOW = 0x4000
    IGNORED = 0x8000
    ONLYDIR = 0x1000000


_init = bind("inotify_init1", Int)
_add_watch = bind("inotify_add_watch", Int, CharP, UInt, path=1)
_rm_watch = bind("inotify_rm_watch", Int, Int)


def inotify_init() -> int:
    """A new instance's descriptor, close-on-exec and non-blocking; EMFILE when the user has too many."""
    return _init(IN_CLOEXEC | IN_NONBLOCK)


def inotify_add_watch(fd: int, path: str, mask: Mask) -> int:
    """The watch's number; a second watch of the same file replaces the first one's mask and has its number."""
    return _add_watch(fd, os.fsencode(path), int(mask))


def inotify_rm_watch(fd: int, watch: int) -> None:
    _rm_watch(fd, watch)


def read_events(fd: int) -> Iterator[tuple[int, Mask, str]]:
    """(watch, what, name in the watched directory) of what is waiting; nothing when nothing is."""
    try:
        data = os.read(fd, 64 * 1024)
    except BlockingIOError:
        return
    yield from parse(data)


def parse(data: bytes) -> Iterator[tuple[int, Mask, str]]:
    """The kernel's records (inotify(7) "Reading events")."""
    at = 0
    while at + _HEADER.size <= len(data):
        watch, mask, _cookie, length = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        yield watch, Mask(mask), os.fsdecode(data[at : at + length].rstrip(b"\0"))
        at += length
