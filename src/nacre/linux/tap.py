"""Tap links: a network link whose wire is a descriptor (tun(4), Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import fcntl
import os
import struct
from enum import IntFlag

from nacre.linux.libc import SyscallError

DEVICE = "/dev/net/tun"
NAME_LIMIT = 15
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFREQ = struct.Struct("16sH22x")


class TunFlag(IntFlag):
    TAP = 0x0002
    NO_PI = 0x1000
    VNET_HDR = 0x4000
    EXCL = 0x8000


class Offload(IntFlag):
    """What the reader of a tap with vnet_hdr can take unfinished (TUNSETOFFLOAD), or'ed."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    UFO = 0x10


def open_tap(name: str, *, vnet_hdr: bool = True, offload: int = 0) -> int:
    """A new tap link `name` in this thread's network namespace; the answer is its wire, one queue, owned by the caller.

    The link lives as long as the descriptor and may be moved to another namespace while it is open (links.move). With `vnet_hdr` a
    struct virtio_net_hdr stands before every frame: it is what carries a partial checksum and segmentation offload between a veth and
    a guest. QEMU sets the offloads itself, by what its guest accepts; until then the kernel finishes checksums before a read.
    Raises SyscallError (EBUSY: the name is a tap that somebody holds; EEXIST or EINVAL: a link of another kind).
    """
    if not 0 < len(name.encode()) <= NAME_LIMIT:
        raise ValueError(f"a link's name has 1 to {NAME_LIMIT} bytes, not {name!r}")
    flags = TunFlag.TAP | TunFlag.NO_PI | TunFlag.EXCL | (TunFlag.VNET_HDR if vnet_hdr else TunFlag(0))
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        if offload:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, offload)
    except OSError as error:
        os.close(fd)
        raise SyscallError("ioctl(TUNSETIFF)", error.errno or 0, name) from error
    return fd
