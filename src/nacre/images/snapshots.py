"""Roots of containers: layer directories below, a directory of their own above. Everything here is quick; nothing is mounted.

    DATA/snapshots/CONTAINER/{upper,work}, image -> IMAGE ID (a link to no file: one call makes it whole, and it keeps the image)

The shim mounts the overlay: one `lowerdir+` a layer, so that their number meets no page-size limit.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nacre.images.errors import SnapshotRefused
from nacre.images.merged import View
from nacre.images.model import Image
from nacre.images.places import GONE, Places, filesystem
from nacre.images.tree import remove_tree
from nacre.oci.errors import Invalid
from nacre.shim.handler import Rootfs

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_NO_UPPER = frozenset(
    {"overlay", "nfs", "nfs4", "9p", "vfat", "exfat", "cifs", "squashfs", "erofs", "iso9660", "fuseblk", "ecryptfs"}
)


def lower_directories(places: Places, image: Image) -> tuple[str, ...]:
    """The `fs` directories of the image, top first, as far down as anything is seen; never none."""
    lower: list[str] = []
    for layer in reversed(image.layers):
        lower.append(f"{places.layer(layer.directory)}/fs")
        if layer.covers:
            break
    return tuple(lower) or (f"{places.layer('empty')}/fs",)


@contextmanager
def view(places: Places, image: Image) -> Iterator[View]:
    """The image's files, seen merged, for the block."""
    with ExitStack() as opened:
        roots = []
        for path in lower_directories(places, image):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            roots.append(fd)
        yield View(roots)


class Snapshots:
    """Makes and releases them. The callers hold the store's shared lock while they make one."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._refusal: SnapshotRefused | None = self._probe()
        self._lower: dict[str, tuple[str, ...]] = {}

    def _probe(self) -> SnapshotRefused | None:
        kind, point = filesystem(self._places.snapshots)
        if kind not in _NO_UPPER:
            return None
        return SnapshotRefused(
            what="make a container's root",
            cause=f"{self._places.data} lies on a file system of type {kind} (mounted on {point}), which cannot carry overlayfs's upper directory",
            remedy=f"mount an ext4, xfs, btrfs or tmpfs file system on {self._places.data}, or start the node with --prefix on one",
        )

    def make(self, image: Image, container: str, *, upper: bool) -> Rootfs:
        """An overlay's directories (`upper`), or only the note that the container uses the image. Made again, it is the same one."""
        if not _NAME.fullmatch(container):
            raise Invalid(what="make a container's root", cause=f"container id {container!r} is no file name")
        if upper and self._refusal is not None:
            raise self._refusal
        directory = f"{self._places.snapshots}/{container}"
        _ensure(directory, 0o700)
        try:
            os.symlink(image.id, f"{directory}/image")
        except FileExistsError:
            pass
        if not upper:
            return Rootfs()
        lower = self._lower.get(image.id)
        if lower is None:
            lower = self._lower[image.id] = lower_directories(self._places, image)
        top = os.stat(lower[0])
        path = f"{directory}/upper"
        if _ensure(path, 0o700):
            os.chown(path, top.st_uid, top.st_gid)  # the merged root takes its attributes from the upper directory
            os.chmod(path, stat.S_IMODE(top.st_mode))
        _ensure(f"{directory}/work", 0o700)
        return Rootfs(lower=lower, upper=path, work=f"{directory}/work")

    def release(self, container: str) -> str:
        """Take the snapshot's name away, by one rename; answers what is left to delete, "" if there is nothing."""
        if not _NAME.fullmatch(container):
            return ""
        gone = f"{self._places.snapshots}/{GONE}{os.urandom(8).hex()}"
        try:
            os.rename(f"{self._places.snapshots}/{container}", gone)
        except FileNotFoundError:
            return ""
        return gone

    def used(self) -> dict[str, str]:
        """container → image id, for every snapshot there is."""
        found: dict[str, str] = {}
        for name in os.listdir(self._places.snapshots):
            if name.startswith(GONE):
                continue
            try:
                found[name] = os.readlink(f"{self._places.snapshots}/{name}/image")
            except OSError:
                found[name] = ""  # a kill came between the directory and its link
        return found

    def forget(self, image_id: str) -> None:
        self._lower.pop(image_id, None)


def _ensure(path: str, mode: int) -> bool:
    """Make the directory; False if it was there."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return False
    return True


def delete(path: str) -> None:
    """Delete a released snapshot or a doomed layer. Blocking; the containers' own trees may be large and deep."""
    head, name = os.path.split(path)
    fd = os.open(head, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(fd, name)
    finally:
        os.close(fd)
