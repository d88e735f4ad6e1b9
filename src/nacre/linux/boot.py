"""What only the first process of a machine does: load kernel modules, feed the random generator, power off."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import IntEnum

from nacre.linux.libc import Int, SyscallError, bind, owned, syscall


class Reboot(IntEnum):
    """reboot(2) as libc takes it."""

    RESTART = 0x01234567
    POWER_OFF = 0x4321FEDC


_reboot = bind("reboot", Int)
_ADD_ENTROPY, _RESEED = 0x40085203, 0x5207  # RNDADDENTROPY, RNDRESEEDCRNG: random(4)
_FLUSH_BUFFERS = 0x1261  # BLKFLSBUF: blockdev --flushbufs


def load_module(path: str, parameters: str = "") -> None:
    """finit_module(2); one that is loaded already is fine."""
    with owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        try:
            syscall("finit_module", fd, parameters.encode(), 0, path=path)
        except SyscallError as error:
            if error.errno != errno.EEXIST:
                raise


def add_entropy(seed: bytes) -> None:
    """Credit `seed` to the kernel's generator as wholly random, and make it take it in now: what it gives next nobody shares."""
    with owned(os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)) as fd:
        fcntl.ioctl(fd, _ADD_ENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(fd, _RESEED)


def flush_buffers(device: int) -> None:
    """Write back and forget what the kernel keeps of the block device open as `device`."""
    fcntl.ioctl(device, _FLUSH_BUFFERS)


def power_off() -> None:
    """At once, without a word to any process."""
    os.sync()
    _reboot(Reboot.POWER_OFF)


def restart() -> None:
    """As `power_off`, but the machine comes back; QEMU started with -no-reboot ends instead."""
    os.sync()
    _reboot(Reboot.RESTART)
