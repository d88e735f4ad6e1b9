"""The VM's drive slots: which image lies behind which, and for how many containers."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

from nacre.agent import protocol
from nacre.kata import machine
from nacre.kata.vm import Vm
from nacre.linux.libc import owned
from nacre.oci.errors import Failure, Unsupported
from nacre.oci.handler import Rootfs

_SUPER_OFFSET, _SUPER_MAGIC = 1024, 0xE0F5E1E2
_UUID_OFFSET = 48  # struct erofs_super_block, fs/erofs/erofs_fs.h


class BadImage(Failure):
    """A root file is no erofs file system."""


@dataclass(slots=True)
class _Drive:
    path: str
    uuid: str
    users: set[str] = field(default_factory=set)


class Drives:
    """One file is one drive, whoever uses it; a slot is free again when its last container is deleted."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[int, _Drive] = {}

    def insert(self, container: str, rootfs: Rootfs, what: str) -> protocol.Root:
        """The container's image behind a slot. Raises Unsupported, BadImage, Failure when every slot is taken."""
        if not rootfs.erofs:
            raise Unsupported(
                what=what,
                cause="a virtual machine takes its root as one erofs file, and there is only a directory of the host",
                remedy="make one: mkfs.erofs -b4096 ROOT.erofs ROOTFS",
            )
        for slot, drive in self._slots.items():
            if drive.path == rootfs.erofs:
                drive.users.add(container)
                return self._root(slot, drive, rootfs)
        free = [slot for slot in range(self._vm.shape.slots) if slot not in self._slots]
        if not free:
            raise Failure(
                what=what,
                cause=f"all {self._vm.shape.slots} drive slots of the virtual machine hold other images",
                remedy="use fewer different images in one pod",
            )
        try:
            fd = os.open(rootfs.erofs, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadImage(what=what, cause=f"open {rootfs.erofs}: {error.strerror}") from error
        with owned(fd):
            drive = _Drive(rootfs.erofs, identity(fd, rootfs.erofs, what), {container})
            self._vm.insert(free[0], fd)
        self._slots[free[0]] = drive
        return self._root(free[0], drive, rootfs)

    def eject(self, container: str) -> None:
        """The container needs its image no more; the guest must have unmounted it."""
        for slot, drive in list(self._slots.items()):
            drive.users.discard(container)
            if not drive.users:
                del self._slots[slot]
                self._vm.eject(slot)

    @staticmethod
    def _root(slot: int, drive: _Drive, rootfs: Rootfs) -> protocol.Root:
        return protocol.Root(drive=machine.slot_name(slot), uuid=drive.uuid, readonly=rootfs.readonly)


def identity(fd: int, path: str, what: str) -> str:
    """The UUID in an erofs super block. Raises BadImage."""
    block = os.pread(fd, 128, _SUPER_OFFSET)
    if len(block) < 128 or struct.unpack_from("<I", block)[0] != _SUPER_MAGIC:
        raise BadImage(what=what, cause=f"{path} is no erofs file system", remedy="remove the image and pull it again")
    hexed = block[_UUID_OFFSET : _UUID_OFFSET + 16].hex()
    return "-".join((hexed[:8], hexed[8:12], hexed[12:16], hexed[16:20], hexed[20:]))
