"""One read-only erofs file an image, 4 KiB blocks, for VMs: DATA/images/erofs/HEX.erofs, made once and shared.

`Erofs` is the store's side. The work is done by `python -m nacre.images.erofs IMAGES PARENT LAYER…` (top first) in a mount namespace
of its own: it mounts the layers as an overlay, so that whiteouts, opaque directories and hard links come out as a container would
see them, gives its capabilities away and executes mkfs.erofs on it. The file gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import uuid

from nacre.images.child import last_lines, python, run
from nacre.images.errors import ImageToolMissing, disk_full
from nacre.images.model import Image
from nacre.images.places import NEW, Places, StoreLock, fsync_directory
from nacre.images.snapshots import lower_directories
from nacre.linux import capabilities, mounts
from nacre.linux.libc import SyscallError, syscall
from nacre.linux.namespaces import Clone, unshare
from nacre.linux.process import set_no_new_privileges, set_parent_death_signal
from nacre.oci.errors import Failure

_KEPT = ("CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN")  # the last: trusted.* is part of what listxattr shows
_SET_STRING, _CREATE = 1, 6  # fsconfig(2)
_SPACE = "no space left on device"


def identity(image_id: str) -> uuid.UUID:
    """The super block's UUID: the same image is the same device, and a guest can tell what was swapped into a slot."""
    return uuid.UUID(hex=image_id.removeprefix("sha256:")[:32])


class Erofs:
    """Makes the files; callers that want the same one wait for one child."""

    def __init__(self, places: Places, lock: StoreLock) -> None:
        self._places = places
        self._lock = lock
        self._running: dict[str, asyncio.Task[str]] = {}

    def state(self, image: Image) -> str:
        """absent, building or ready."""
        if os.path.exists(self._places.erofs_file(image.id)):
            return "ready"
        return "building" if image.id in self._running else "absent"

    async def ensure(self, image: Image) -> str:
        """The file's path, made if it is not there. Who stops waiting does not stop it."""
        path = self._places.erofs_file(image.id)
        if os.path.exists(path):
            return path
        task = self._running.get(image.id)
        if task is None:
            task = self._running[image.id] = asyncio.get_running_loop().create_task(self._build(image, path))
            task.add_done_callback(lambda done: self._finished(image.id, done))
        return await asyncio.shield(task)

    def _finished(self, image_id: str, task: asyncio.Task[str]) -> None:
        self._running.pop(image_id, None)
        if not task.cancelled():
            task.exception()  # a failure nobody waits for any more is told to the next caller by its own try

    async def close(self) -> None:
        """End what is being built."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _build(self, image: Image, path: str) -> str:
        what = f"make {image.name} into a block device for virtual machines"
        tool = shutil.which("mkfs.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if tool is None:
            cause = "mkfs.erofs is not installed"
            raise ImageToolMissing(what=what, cause=cause, remedy="apt-get install --no-install-recommends erofs-utils")
        new = f"{self._places.erofs}/{NEW}{os.urandom(8).hex()}"
        layers = [os.path.relpath(one, self._places.layers) for one in lower_directories(self._places, image)]
        command = python("nacre.images.erofs", self._places.images, str(os.getpid()), tool, new, str(identity(image.id)), *layers)
        with self._lock.shared():
            await self._make(what, command, new, path)
        return path

    async def _make(self, what: str, command: list[str], new: str, path: str) -> None:
        try:
            code, err = await run(command)
            if code != 0:
                if _SPACE in err.decode("utf-8", "replace").lower():
                    raise disk_full(what, self._places.erofs)
                how = f"exit code {code}" if code > 0 else f"signal {-code}"
                raise Failure(what=what, cause=f"mkfs.erofs ended with {how}", evidence=last_lines(err))
            await asyncio.to_thread(_settle, new, path)
        finally:
            try:
                os.unlink(new)
            except FileNotFoundError:
                pass


def _settle(new: str, path: str) -> None:
    fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)
    fsync_directory(os.path.dirname(path))


def _mount_layers(layers: list[str], target: str) -> None:
    """Mount the layers (relative to the current directory, top first) read-only on `target`."""
    try:
        context = syscall("fsopen", b"overlay", 1)
        for layer in layers:
            syscall("fsconfig", context, _SET_STRING, b"lowerdir+", os.fsencode(layer), 0, path=layer)
        syscall("fsconfig", context, _CREATE, None, None, 0, path="overlay")
        tree = syscall("fsmount", context, 1, 0)
        point = os.open(target, os.O_PATH | os.O_CLOEXEC)
        mounts.move_mount(tree, point)
    except SyscallError as error:
        data = "lowerdir=" + ":".join(layers)  # before Linux 6.8 there is no lowerdir+, and mount(2) takes one page
        if len(data) >= os.sysconf("SC_PAGESIZE"):
            raise error
        mounts.mount("overlay", target, "overlay", mounts.MountFlag.RDONLY, data)


def _options(tool: str) -> list[str]:
    """-b4096 where mkfs.erofs knows it (1.6 on); before, blocks are of a page, 4 KiB on all machines that nacre runs VMs on."""
    import subprocess

    shown = subprocess.run([tool, "--help"], capture_output=True, check=False)
    text = shown.stdout + shown.stderr
    return [*(["-b4096"] if b" -b#" in text else []), *(["--preserve-mtime"] if b"--preserve-mtime" in text else []), "--quiet"]


def main() -> None:
    images, parent, tool, output, name, *layers = sys.argv[1:]
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)
    options = _options(tool)
    unshare(Clone.NEWNS | Clone.NEWNET | Clone.NEWIPC)
    mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE)
    os.chdir(f"{images}/layers")
    point = f"{images}/layers/empty/fs"
    stack = layers if len(layers) > 1 else [*layers, "empty/fs"]  # without an upper directory overlayfs wants two below
    if layers != ["empty/fs"]:
        _mount_layers(stack, point)
    permitted = capabilities.capget()[1]
    kept = capabilities.mask(_KEPT) & permitted
    capabilities.bound(kept, len(capabilities.NAMES) - 1)
    capabilities.capset(kept, kept, 0)
    set_no_new_privileges()
    os.umask(0o077)
    set_parent_death_signal(signal.SIGKILL)
    os.execv(tool, [tool, *options, "-U", name, output, point])


if __name__ == "__main__":
    main()
