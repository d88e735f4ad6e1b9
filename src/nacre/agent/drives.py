"""Block devices of the VM: found by serial, checked by their erofs super block, mounted under a writable layer, given back clean."""

from __future__ import annotations

import errno
import os
import select
import struct
from contextlib import ExitStack

from nacre.agent.protocol import Root
from nacre.linux import boot, mounts
from nacre.linux.libc import SyscallError, owned
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.linux.overlay import mount_overlay
from nacre.oci.errors import Failure, NotFound

# erofs_super_block: magic u32 at 1024, uuid at 48 from there (fs/erofs/erofs_fs.h)
_PLACE, _MAGIC, _UUID_AT = 1024, 0xE0F5E1E2, 48
_RELEASE_TRIES, _RELEASE_MS = 200, 10


class DriveMismatch(Failure):
    """A slot holds something else than the root file system that was announced."""


class DriveBusy(Failure):
    """A root file system's device is still in use after everything that used it was ended."""


_nodes: dict[str, str] = {}  # serial to device node, as they were found


def find(serial: str) -> str:
    """The device node of the drive with this serial, which is for good. Raises NotFound naming those there are."""
    if serial not in _nodes:
        _nodes.update(_look())
    if serial not in _nodes:
        raise NotFound(what=f"find drive {serial}", cause=f"the guest has {', '.join(sorted(_nodes)) or 'no drive'}")
    return _nodes[serial]


def _look() -> dict[str, str]:
    """Every drive with a serial; a file read for each, so the throw-away container has it done before a pod comes."""
    seen = {}
    for name in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{name}/serial", encoding="ascii", errors="replace") as file:
                seen[file.read().strip("\0\n ")] = f"/dev/{name}"
        except FileNotFoundError:
            continue
    return seen


def known() -> None:
    """Have the drives that there are at hand from now on."""
    _nodes.update(_look())


def check(device: str, wanted: str) -> None:
    """Nothing that the kernel remembers of the slot counts: the super block is read anew. Raises DriveMismatch."""
    with owned(os.open(device, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        boot.flush_buffers(fd)
        block = os.pread(fd, 128, _PLACE)
    magic = struct.unpack_from("<I", block)[0] if len(block) == 128 else 0
    found = _dashed(block[_UUID_AT : _UUID_AT + 16].hex()) if magic == _MAGIC else "no erofs"
    if found != wanted.lower():
        raise DriveMismatch(what=f"mount {device}", cause=f"it holds {found}, announced was {wanted}")


def _dashed(digits: str) -> str:
    """As a UUID is written; the module uuid would bring half of the library along."""
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def mount_own(directory: str) -> None:
    """The guest's own root, read-only in effect, as the root of the throw-away container that warms it."""
    layer, target = f"{directory}/layer", f"{directory}/rootfs"
    for path in (layer, target):
        os.mkdir(path)
    with ExitStack() as undo:
        mounts.mount("layer", layer, "tmpfs", MountFlag.NODEV, "mode=755")
        undo.callback(_unmount, layer)
        os.mkdir(f"{layer}/upper", 0o755)
        os.mkdir(f"{layer}/work", 0o755)
        mount_overlay(target, ["/"], f"{layer}/upper", f"{layer}/work")
        undo.pop_all()


def mount_root(directory: str, root: Root) -> str:
    """The container's root at DIRECTORY/rootfs; what is mounted on the way lies beside it. Undone when it fails."""
    device = find(root.drive)
    check(device, root.uuid)
    lower, layer, target = (f"{directory}/{name}" for name in ("lower", "layer", "rootfs"))
    with ExitStack() as undo:
        for path in (lower, layer, target):
            os.makedirs(path, exist_ok=True)
        mounts.mount(device, lower, "erofs", MountFlag.RDONLY | MountFlag.NODEV)
        undo.callback(_unmount, lower)
        size = f",size={root.size_bytes}" if root.size_bytes else ""
        mounts.mount("layer", layer, "tmpfs", MountFlag.NODEV, f"mode=755{size}")
        undo.callback(_unmount, layer)
        os.mkdir(f"{layer}/upper", 0o755)
        os.mkdir(f"{layer}/work", 0o755)
        mount_overlay(target, [lower], f"{layer}/upper", f"{layer}/work")
        undo.pop_all()
    return target


def unmount_root(directory: str, serial: str) -> None:
    """All of `mount_root` off again, in a way that nothing of the device stays in use. Raises DriveBusy."""
    for name in ("rootfs", "layer", "lower"):
        _unmount(f"{directory}/{name}")
    if serial:
        _release(find(serial))


def _unmount(path: str) -> None:
    try:
        mounts.umount2(path)
    except SyscallError as error:
        if error.errno == errno.EBUSY:
            mounts.umount2(path, UnmountFlag.DETACH)  # whether anybody really holds on to it, `_release` finds out
        elif error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _release(device: str) -> None:
    """A dead process's mounts are dropped a moment after it: an exclusive open succeeds only when no file system holds the device."""
    for _ in range(_RELEASE_TRIES):
        try:
            with owned(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)) as fd:
                boot.flush_buffers(fd)
                return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        select.select((), (), (), _RELEASE_MS / 1000)  # the kernel announces it to nobody
    raise DriveBusy(what=f"give back {device}", cause=f"its file system is in use after {_RELEASE_TRIES * _RELEASE_MS} ms")
