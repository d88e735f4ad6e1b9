"""From a manifest whose blobs can be had to an image with a name: the half that pull, import and repair share.

Order, so that a kill anywhere leaves only what the next `open` takes out or continues: blobs, each durable under its digest; layers
bottom up, each durable under its chain id; then one commit that names the image.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from nacre.images import manifests
from nacre.images.child import Unpacker
from nacre.images.content import Content
from nacre.images.database import Database
from nacre.images.errors import ImageRefused
from nacre.images.manifests import Manifest, Platform
from nacre.images.model import Descriptor, Image, Layer, Progress
from nacre.images.places import Places, StoreLock

Fetch = Callable[[Descriptor], Awaitable[None]]  # makes sure that a blob is in the content store


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One image to be installed: what to call the act, its manifest, its names."""

    what: str
    manifest: Descriptor
    references: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    lease: str = ""
    pinned: bool = False
    pulled_as: str = ""


class Installer:
    """Holds what every installation needs; lives as long as the store, in its loop."""

    def __init__(self, places: Places, content: Content, database: Database, lock: StoreLock, host: Platform) -> None:
        self._places = places
        self._content = content
        self._database = database
        self._lock = lock
        self._host = host
        self._unpacking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def install(self, job: Job, fetch: Fetch, progress: Progress | None = None) -> Image:
        """The manifest's blob is here already; `fetch` gets the rest, several at once. The caller holds the shared lock."""
        data = await asyncio.to_thread(self._content.read, job.manifest, manifests.MANIFEST_LIMIT)
        manifest = manifests.manifest(job.what, manifests.decode(job.what, data))
        if job.lease:
            digests = {job.manifest.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
            await asyncio.to_thread(self._database.lease, job.lease, digests)
        await fetch(manifest.config)
        raw = await asyncio.to_thread(self._content.read, manifest.config, manifests.CONFIG_LIMIT)
        config, diff_ids = manifests.configuration(job.what, raw, len(manifest.layers), self._host)
        layers = await self._layers(manifest, diff_ids, fetch, progress)
        image = self._image(job, manifest, config, layers)
        await asyncio.to_thread(self._database.record, image, lease=job.lease)
        return self._database.index().images[image.id]

    async def unpack_again(self, image: Image) -> None:
        """Bring back layers whose directories are gone or broken, from blobs that are here."""

        async def here(blob: Descriptor) -> None:
            if not self._content.has(blob):
                raise ImageRefused(
                    what=f"repair {image.name}", cause=f"blob {blob.digest} is gone", remedy=f"nacre image pull {image.name}"
                )

        manifest = Manifest(image.config_blob, tuple(layer.blob for layer in image.layers))
        await self._layers(manifest, tuple(layer.diff_id for layer in image.layers), here, None)

    def _image(self, job: Job, manifest: Manifest, config: dict[str, Any], layers: tuple[Layer, ...]) -> Image:
        known = self._database.index().images.get(manifest.config.digest)
        return Image(
            id=manifest.config.digest,
            references=job.references,
            digests=job.digests,
            size=manifest.config.size + sum(layer.size for layer in manifest.layers),
            config=config,
            layers=layers,
            manifest=job.manifest,
            config_blob=manifest.config,
            pinned=job.pinned or (known is not None and known.pinned),
            pulled_at=int(time.time()),
            pulled_as=job.pulled_as or (known.pulled_as if known is not None else ""),
        )

    async def _layers(
        self, manifest: Manifest, diff_ids: tuple[str, ...], fetch: Fetch, progress: Progress | None
    ) -> tuple[Layer, ...]:
        """Fetch all, unpack each as soon as it and those below it are there. The first failure ends the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {blob.digest: group.create_task(_run(fetch(blob))) for blob in manifest.layers}
                unpacked = group.create_task(self._unpack_all(manifest, diff_ids, tasks, progress))
        except BaseExceptionGroup as failed:
            raise _first(failed) from None
        return unpacked.result()

    async def _unpack_all(
        self, manifest: Manifest, diff_ids: tuple[str, ...], fetched: dict[str, asyncio.Task[None]], progress: Progress | None
    ) -> tuple[Layer, ...]:
        done: list[Layer] = []
        async with Unpacker(self._places, self._lock) as unpacker:
            for blob, diff_id, chain_id in zip(manifest.layers, diff_ids, manifests.chain_ids(diff_ids), strict=True):
                await asyncio.shield(fetched[blob.digest])
                if progress is not None:
                    progress("unpack", len(done), len(diff_ids))
                lock = self._unpacking.setdefault(chain_id, asyncio.Lock())
                async with lock:
                    done.append(await self._unpack(unpacker, done, blob, diff_id, chain_id))
        if progress is not None:
            progress("unpack", len(done), len(diff_ids))
        return tuple(done)

    async def _unpack(self, unpacker: Unpacker, below: list[Layer], blob: Descriptor, diff_id: str, chain_id: str) -> Layer:
        layer = Layer(chain_id=chain_id, diff_id=diff_id, blob=blob)
        lower = []
        for one in reversed(below):
            lower.append(one.directory)
            if one.covers:
                break
        request = {"blob": blob.digest.removeprefix("sha256:"), "layer": layer.directory, "diff_id": diff_id, "below": lower}
        facts = await unpacker.unpack(request)
        return Layer(
            chain_id=chain_id,
            diff_id=diff_id,
            blob=blob,
            unpacked_bytes=facts["stored_bytes"],
            stream_bytes=facts["stream_bytes"],
            inodes=facts["inodes"],
            covers=facts["covers"],
        )


def _run(awaitable: Awaitable[None]) -> Coroutine[Any, Any, None]:
    async def body() -> None:
        await awaitable

    return body()


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that ended a group; the others are its consequence."""
    first = failed.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
