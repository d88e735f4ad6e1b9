"""Volumes whose contents the host sends: ConfigMaps and the like, empty directories, single files.

    /run/nacre/volumes/NAME/              a directory, or a tmpfs of its own
        FILE → ..data/FILE                with a generation: what the container sees
        ..data → ..GENERATION             switched by rename, as the kubelet does it
        ..GENERATION/FILE

A kill between two writes kills the VM with it: there is no half state to find.
"""

from __future__ import annotations

import os
import shutil
import stat

from nacre.agent import boot
from nacre.agent.protocol import Content, File, Files, Place, ReadFile, Volume
from nacre.linux import mounts, paths
from nacre.linux.libc import SyscallError, owned
from nacre.linux.mounts import MountFlag
from nacre.oci.errors import Invalid, NotFound

VOLUMES = f"{boot.RUN}/volumes"
_DATA = "..data"


def make(wanted: Volume) -> Place:
    """An empty directory, as emptyDir means it."""
    path = f"{VOLUMES}/{wanted.name}"
    os.mkdir(path)
    if wanted.memory or wanted.size_bytes:
        size = f"size={wanted.size_bytes}" if wanted.size_bytes else "size=100%"
        mounts.mount("volume", path, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, size)
    os.chown(path, wanted.uid, wanted.gid)
    os.chmod(path, wanted.mode)
    return Place(path=path)


def write(wanted: Files) -> Place:
    """Files into a volume; see `protocol.Files`. Every path is checked before the first is written."""
    for file in wanted.files:
        _check(wanted, file)
    path = f"{VOLUMES}/{wanted.name}"
    os.makedirs(path, mode=0o755, exist_ok=True)
    if not wanted.generation:
        for file in wanted.files:
            _put(path, file)
        return Place(path=path)
    fresh = f"..{wanted.generation}"
    os.mkdir(f"{path}/{fresh}", 0o755)
    for file in wanted.files:
        _put(f"{path}/{fresh}", file)
    former = os.readlink(f"{path}/{_DATA}") if os.path.islink(f"{path}/{_DATA}") else ""
    _link(path, _DATA, fresh)
    _show(path, {file.path.split("/")[0] for file in wanted.files})
    if former and former != fresh:
        shutil.rmtree(f"{path}/{former}")
    return Place(path=path)


def _check(wanted: Files, file: File) -> None:
    parts = file.path.split("/")
    what = f"write to volume {wanted.name}"
    if not all(part not in ("", ".", "..") and "\0" not in part for part in parts):
        raise Invalid(what=what, cause=f"{file.path!r} is no path below it")
    if wanted.generation and parts[0].startswith(".."):
        raise Invalid(what=what, cause=f"{file.path!r} begins with two dots, as only generations do")
    if file.kind not in File.kinds:
        raise Invalid(what=what, cause=f"{file.path!r} has kind {file.kind!r}")


def _put(base: str, file: File) -> None:
    """One entry; no link in the volume (a container may have made some) is followed."""
    directory, _, name = file.path.rpartition("/")
    with owned(paths.open_root(base)) as root, owned(paths.make_directories_in(root, directory or "/")) as parent:
        where = paths.magic(parent)
        if file.kind == "link":
            _link(where, name, os.fsdecode(file.content))
        elif file.kind == "directory":
            if not os.path.lexists(f"{where}/{name}"):
                os.mkdir(f"{where}/{name}")
            with owned(os.open(f"{where}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
                _give(fd, file)
        else:
            draft = f"{where}/..{name}.new"
            with owned(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as fd:
                view = memoryview(file.content)
                while view:
                    view = view[os.write(fd, view) :]
                _give(fd, file)
            os.rename(draft, f"{where}/{name}")


def _give(fd: int, file: File) -> None:
    os.fchown(fd, file.uid, file.gid)
    os.fchmod(fd, file.mode & 0o7777)


def _link(directory: str, name: str, target: str) -> None:
    draft = f"{directory}/..{name}.link"
    if os.path.islink(draft):
        os.unlink(draft)
    os.symlink(target, draft)
    os.rename(draft, f"{directory}/{name}")


def _show(path: str, names: set[str]) -> None:
    """Top-level names are links into the current generation; those of no file any more go."""
    for name in os.listdir(path):
        link = f"{path}/{name}"
        if not name.startswith("..") and name not in names and os.path.islink(link):
            os.unlink(link)
    for name in names:
        if not os.path.islink(f"{path}/{name}"):
            _link(path, name, f"{_DATA}/{name}")


def read(wanted: ReadFile) -> Content:
    """The end of a file, as containers left it. Only a regular file of the volume itself is read."""
    try:
        with (
            owned(paths.open_root(f"{VOLUMES}/{wanted.name}")) as root,
            owned(paths.open_in(root, wanted.path, os.O_RDONLY | os.O_NONBLOCK)) as fd,
        ):
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise NotFound(what=f"read {wanted.path} of volume {wanted.name}", cause="it is no regular file")
            limit = max(0, min(wanted.limit, 1 << 20))
            return Content(content=os.pread(fd, limit, max(0, found.st_size - limit)))
    except SyscallError as error:
        raise NotFound(what=f"read {wanted.path} of volume {wanted.name}", cause=str(error)) from None


def remove(name: str) -> None:
    """The volume with all it holds; what is gone stays gone."""
    path = f"{VOLUMES}/{name}"
    mounts.unmount_all(path)
    if os.path.isdir(path):
        shutil.rmtree(path)
