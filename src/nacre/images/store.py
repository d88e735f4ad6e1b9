"""The door to images: one Store a process, opened in its loop. The daemon has one, every `nacre image` another beside it.

Several processes may have the store open: SQLite and the lock file (`places`) keep them apart, and each sees what another commits at
its next question. The methods without `async` are quick enough for the loop: a few microseconds for `get`, some tens for `rootfs`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nacre.config import Config
from nacre.images import garbage, users
from nacre.images.archives import Importer
from nacre.images.content import Content
from nacre.images.database import Database, Index
from nacre.images.erofs import Erofs
from nacre.images.errors import ImageNotFound, InvalidImageName
from nacre.images.export import export
from nacre.images.install import Installer
from nacre.images.manifests import host_platform
from nacre.images.model import Auth, Image, Progress, User
from nacre.images.places import Places, StoreLock
from nacre.images.reference import parse
from nacre.images.snapshots import Snapshots, delete, view
from nacre.oci.errors import Failure, WrongStatus
from nacre.shim.handler import Rootfs

if TYPE_CHECKING:
    from nacre.images.pull import Puller
    from nacre.images.registry import Patience

log = logging.getLogger("nacre.images")
_SHORTEST_ID = 4
Images = list[Image]  # the class below has a method of that name


class Store:
    """The images of one node. Made anywhere; `open` and all `async` methods belong to one running loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._places = Places.of(config)
        self._users: dict[tuple[str, str], User] = {}
        self._opened = False
        self._garbage = False  # an exclusive lock was wanted in vain
        self._puller: Puller | None = None
        self.patience: Patience | None = None  # with registries; None: the default. Set before the first pull

    async def open(self) -> None:
        """Make the directories, finish or undo what a kill left, and repair layers whose files do not match what is known."""
        if self._opened:
            return
        await asyncio.to_thread(self._places.make)
        self._lock = StoreLock(self._places.lock)
        try:
            self._database = await asyncio.to_thread(Database, self._places.database)
        except BaseException:
            self._lock.close()
            raise
        self._content = Content(self._places)
        self._snapshots = Snapshots(self._places)
        self._erofs = Erofs(self._places, self._lock)
        host = host_platform()
        self._installer = Installer(self._places, self._content, self._database, self._lock, host)
        self._importer = Importer(self._places, self._content, self._installer, host)
        self._thread = ThreadPoolExecutor(1, "images")  # deletions, one after the other
        self._opened = True
        try:
            await self._repair()
            await self._collect()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End pulls and builds under way (what they have fetched is kept for the next), wait for deletions.

        What could not be collected because somebody was adding content is, if nobody does so any more.
        """
        if not self._opened:
            return
        self._opened = False
        if self._puller is not None:
            await self._puller.close()
            self._puller = None
        await self._erofs.close()
        if self._garbage:
            await self._collect()
        await asyncio.to_thread(self._thread.shutdown)
        self._database.close()
        self._lock.close()

    # What there is

    def get(self, reference_or_id: str) -> Image | None:
        """The image of a name in any form (`nginx`, `repo@sha256:…`), an id, or an id's unambiguous beginning; None if there is none."""
        index = self._index()
        found = index.images.get(reference_or_id)
        if found is not None:
            return found
        try:
            name = str(parse(reference_or_id))
        except InvalidImageName:
            name = ""
        if name in index.names:
            return index.images.get(index.names[name])
        short = reference_or_id.removeprefix("sha256:")
        if len(short) < _SHORTEST_ID or not all(letter in "0123456789abcdef" for letter in short):
            return None
        matching = [image for image_id, image in index.images.items() if image_id.startswith("sha256:" + short)]
        return matching[0] if len(matching) == 1 else None

    def list(self) -> Images:
        """Every image, by name."""
        return sorted(self._index().images.values(), key=lambda image: image.name)

    def usage(self) -> tuple[int, int]:
        """(bytes, inodes) that images take: blobs, unpacked layers, erofs files. Shared layers count once."""
        index = self._index()
        images = [*index.images.values(), *index.hidden.values()]
        layers = {layer.chain_id: layer for image in images for layer in image.layers}
        blobs = {blob.digest: blob.size for image in images for blob in (image.manifest, image.config_blob)}
        blobs |= {layer.blob.digest: layer.blob.size for layer in layers.values()}
        size = sum(blobs.values()) + sum(layer.unpacked_bytes for layer in layers.values())
        inodes = len(blobs) + sum(layer.inodes for layer in layers.values())
        for image in images:
            try:
                size += os.stat(self._places.erofs_file(image.id)).st_size
                inodes += 1
            except FileNotFoundError:
                continue
        return size, inodes

    def resolve_user(self, image: Image, spec: str) -> User:
        """Who `spec` ("", "nginx", "101:101", …) is by the image's passwd and group. Raises UserNotFound in words."""
        key = (image.id, spec)
        if key not in self._users:
            with view(self._places, image) as merged:
                self._users[key] = users.resolve(merged, image.name, spec)
        return self._users[key]

    # Roots of containers

    def rootfs(self, image: Image, container_id: str) -> Rootfs:
        """Lower directories, top first, and an upper and a work directory made for the container. Raises SnapshotRefused."""
        with self._lock.shared():
            self._must_be_here(image)
            return self._snapshots.make(image, container_id, upper=True)

    async def vm_rootfs(self, image: Image, container_id: str) -> Rootfs:
        """The image's erofs file, built now if need be. Raises ImageToolMissing, DiskFull."""
        with self._session():
            self._must_be_here(image)
            self._snapshots.make(image, container_id, upper=False)
            try:
                return Rootfs(erofs=await self._erofs.ensure(image))
            except BaseException:
                self.release(container_id)
                raise

    def erofs_state(self, image: Image) -> str:
        """absent, building or ready: what an event can say while a VM pod waits."""
        return self._erofs.state(image)

    def release(self, container_id: str) -> None:
        """The container's snapshot away, at once by name; its files are deleted in a thread. Releasing what is gone succeeds."""
        gone = self._snapshots.release(container_id)
        if gone:
            self._thread.submit(delete, gone).add_done_callback(_log_failure)
        if self._index().hidden:
            self._thread.submit(self._collect_now).add_done_callback(_log_failure)

    def snapshots(self) -> dict[str, str]:
        """container id → image id, for every snapshot on the disk: a restarted daemon releases those it does not know."""
        return self._snapshots.used()

    # Images come and go

    async def pull(
        self, reference: str, auth: Auth | None = None, *, for_vm: bool = False, progress: Progress | None = None
    ) -> Image:
        """Bring the image here; concurrent pulls of one image share one download. Raises the failures of `errors`."""
        if self._puller is None:
            from nacre.images.pull import Puller  # aiohttp comes with it

            self._puller = Puller(self._config, self._content, self._database, self._installer, self.patience)
        try:
            with self._session():
                image: Image = await self._puller.pull(parse(reference), auth, progress)
                if for_vm:
                    if progress is not None and self._erofs.state(image) != "ready":
                        progress("making its drive for virtual machines", 0, 0)
                    await self._erofs.ensure(image)
                return image
        except Failure:
            self._garbage = True
            raise
        finally:
            await self._collect_if_due()

    async def import_archive(self, path: str, *, name: str = "") -> Images:
        """Every image of an OCI layout (directory or tar) or docker-archive; `name` replaces the names of the only one."""
        try:
            with self._session():
                return await self._importer.run(path, name)
        except Failure:
            self._garbage = True
            raise
        finally:
            await self._collect_if_due()

    async def export_archive(self, references: Sequence[str], path: str, format: str = "oci") -> None:
        """Write images to `path` as "oci" (layout in a tar), "oci-dir" or "docker" (what `docker load` takes)."""
        with self._session():
            images = [(name, self._wanted(name, "export")) for name in references]
            await asyncio.to_thread(export, self._content, images, path, format)

    async def remove(self, reference_or_id: str, *, untag: bool = False) -> bool:
        """Remove the image with all its names, or with `untag` only this name while it has others. False if there is none.

        Layers that other images share, and those under a container that still has its root, stay until nobody needs them.
        """
        image = self.get(reference_or_id)
        if image is None:
            return False
        name = "" if image.id.startswith(reference_or_id) else str(parse(reference_or_id))
        others = [one for one in image.references if one != name]
        if untag and name in image.references and others:
            await asyncio.to_thread(self._database.forget_name, name)
            return True
        await asyncio.to_thread(self._database.hide, image.id)
        self._users = {key: user for key, user in self._users.items() if key[0] != image.id}
        self._snapshots.forget(image.id)
        await self._collect()
        return True

    async def pin(self, reference_or_id: str, *, pinned: bool = True) -> None:
        """Keep the kubelet from collecting the image, or let it."""
        image = self._wanted(reference_or_id, "pin")
        await asyncio.to_thread(self._database.pin, image.id, pinned=pinned)

    # Within

    def _index(self) -> Index:
        return self._database.index()

    def _wanted(self, name: str, act: str) -> Image:
        image = self.get(name)
        if image is None:
            raise ImageNotFound(what=f"{act} {name}", cause="there is no such image on this node", remedy="nacre image ls")
        return image

    def _must_be_here(self, image: Image) -> None:
        index = self._database.index()
        if image.id not in index.images and image.id not in index.hidden:
            cause = "the image has been removed meanwhile"
            raise ImageNotFound(what=f"make a root from {image.name}", cause=cause, remedy=f"nacre image pull {image.name}")

    @contextmanager
    def _session(self) -> Iterator[None]:
        if not self._opened:
            raise WrongStatus(what="use the image store", cause="it is not open")
        with self._lock.shared():
            yield

    async def _repair(self) -> None:
        with self._session():
            for image in tuple(self._database.index().images.values()):
                broken = await asyncio.to_thread(garbage.broken_layers, self._places, image)
                if not broken:
                    continue
                log.warning("image %s: layers %s are not as recorded, unpacking again", image.name, ", ".join(broken))
                for directory in broken:
                    garbage.set_aside(self._places, directory)
                try:
                    await self._installer.unpack_again(image)
                except Failure as failure:
                    log.error("%s; the image is dropped and must be pulled again", failure.sentence())
                    await asyncio.to_thread(self._database.hide, image.id)

    async def _collect_if_due(self) -> None:
        if self._garbage and self._opened:
            await self._collect()

    async def _collect(self) -> None:
        await asyncio.wrap_future(self._thread.submit(self._collect_now))

    def _collect_now(self) -> None:
        self._garbage = not garbage.collect(self._places, self._database, self._snapshots, self._lock)


def _log_failure(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("deleting what is not needed any more: %s", error)
