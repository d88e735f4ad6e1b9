"""Pulls: from a reference to an installed image, with what runs at the same time shared.

One Puller a store. Pulls of the same reference with the same credentials are one; a blob that several pulls need is fetched once; at
most three blobs of a pull come at a time. A download that breaks goes on where it stopped, here or in the next pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import aiohttp

from nacre.config import Config
from nacre.images import local, manifests
from nacre.images.content import Content, Ingest
from nacre.images.database import Database
from nacre.images.errors import (
    DigestMismatch,
    DiskFull,
    ImageNotFound,
    ImageRefused,
    LayerRefused,
    NoMatchingPlatform,
    PullStalled,
)
from nacre.images.install import Installer, Job
from nacre.images.model import Auth, Descriptor, Image, Progress
from nacre.images.reference import LOCAL_DOMAIN, Reference
from nacre.images.registry import Broken, Patience, Registry
from nacre.oci.errors import Failure, Unsupported

PARALLEL = 3
_WRITTEN_AT_ONCE = 1 << 20
_PROGRESS = 1 << 16  # bytes that make a try worth another
_INDEX_DEPTH = 3
_HOPELESS = (
    DigestMismatch,
    DiskFull,
    ImageRefused,
    LayerRefused,
    NoMatchingPlatform,
    Unsupported,
)  # nothing worth keeping for the next try
P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K")


@dataclass(slots=True)
class _Shared:
    """Work that several wait for; it is cancelled when the last of them goes."""

    task: asyncio.Task[Image] | asyncio.Task[None]
    waiters: int = 0
    listeners: list[Progress] = field(default_factory=list)
    left: bool = False  # by the last: being cancelled, nobody may join any more


class Puller:
    """See the module. Belongs to one loop; `close` ends what runs."""

    def __init__(
        self, config: Config, content: Content, database: Database, installer: Installer, patience: Patience | None
    ) -> None:
        self._config = config
        self._content = content
        self._database = database
        self._installer = installer
        self._session: aiohttp.ClientSession | None = None
        self._pulls: dict[tuple[str, Auth | None], _Shared] = {}
        self._blobs: dict[str, _Shared] = {}
        self._patience = patience or Patience()

    async def close(self) -> None:
        tasks = [shared.task for shared in (*self._pulls.values(), *self._blobs.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def pull(self, reference: Reference, auth: Auth | None, progress: Progress | None) -> Image:
        key = (str(reference), auth)
        shared = self._pulls.get(key)
        if shared is None or shared.left:
            listeners: list[Progress] = []

            def tell(what: str, done: int, total: int) -> None:
                for listener in tuple(listeners):
                    listener(what, done, total)

            task = asyncio.create_task(self._pull(reference, auth, tell))
            shared = self._pulls[key] = _Shared(task, listeners=listeners)
            task.add_done_callback(lambda _: _take_out(self._pulls, key, shared))
        if progress is not None:
            shared.listeners.append(progress)
        try:
            await _wait(shared)
        finally:
            if progress is not None:
                shared.listeners.remove(progress)
        image = shared.task.result()
        assert image is not None
        return image

    async def _pull(self, reference: Reference, auth: Auth | None, progress: Progress) -> Image:
        what = f'pull image "{reference}"'
        if reference.domain == LOCAL_DOMAIN:
            return await self._local(what, reference, progress)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False, headers={"User-Agent": "nacre", "Accept-Encoding": "identity"}, trust_env=False
            )
        registry = Registry(
            self._session,
            reference,
            auth,
            plain=reference.domain in self._config.insecure_registries,
            settings=f"{self._config.etc}/config.toml",
            patience=self._patience,
        )
        top, manifest = await self._manifest(what, registry, reference)
        job = Job(
            what=what,
            manifest=manifest,
            references=() if reference.digest else (str(reference),),
            digests=(reference.pinned(top),),
            lease=str(reference),
            pulled_as=reference.pinned(top),
        )
        gate = asyncio.Semaphore(PARALLEL)

        async def fetch(blob: Descriptor) -> None:
            async with gate:
                await self._blob(what, registry, blob, progress)

        try:
            return await self._installer.install(job, fetch, progress)
        except _HOPELESS:
            await asyncio.to_thread(self._database.end_lease, job.lease)
            raise

    async def _local(self, what: str, reference: Reference, progress: Progress) -> Image:
        """Names of this node's own: no registry has them. What is here is the newest there is; the demo's are made when first asked for."""
        image = self._here(reference)
        if image is None and str(reference) in local.NAMES:
            await local.make(self._config, str(reference), progress)
            image = self._here(reference)
        if image is None:
            cause = f"{reference}: not found: images of {LOCAL_DOMAIN} are this node's own; made at their first pull are {', '.join(local.NAMES)}"
            raise ImageNotFound(what=what, cause=cause, remedy="nacre image import FILE --name NAME")
        return image

    def _here(self, reference: Reference) -> Image | None:
        index = self._database.index()
        return index.images.get(index.names.get(str(reference), ""))

    async def _manifest(self, what: str, registry: Registry, reference: Reference) -> tuple[str, Descriptor]:
        """(digest of what the reference names, descriptor of this platform's manifest, which is in the content store)."""
        wanted, top = reference.wanted, ""
        for _ in range(_INDEX_DEPTH):
            data, media_type = await registry.manifest(wanted)
            digest = manifests.digest_of(data)
            if wanted.startswith("sha256:") and digest != wanted:
                raise DigestMismatch(what=what, cause=f"{registry.host} sent a manifest that is {digest}, not {wanted}")
            top = top or digest
            document = manifests.decode(what, data)
            kind = manifests.kind_of(what, document, media_type)
            if kind in manifests.MANIFESTS:
                manifests.manifest(what, document)  # refused before anything of it is kept
                return top, await asyncio.to_thread(self._content.put, data, kind)
            wanted = manifests.choose(what, document, manifests.host_platform()).digest
        raise ImageRefused(what=what, cause="an index of an index of an index")

    # Blobs

    async def _blob(self, what: str, registry: Registry, blob: Descriptor, progress: Progress) -> None:
        if self._content.has(blob):
            progress(blob.digest, blob.size, blob.size)
            return
        shared = self._blobs.get(blob.digest)
        if shared is None or shared.left:
            task = asyncio.create_task(self._download(what, registry, blob, progress))
            shared = self._blobs[blob.digest] = _Shared(task)
            task.add_done_callback(lambda _: _take_out(self._blobs, blob.digest, shared))
        await _wait(shared)
        progress(blob.digest, blob.size, blob.size)

    async def _download(self, what: str, registry: Registry, blob: Descriptor, progress: Progress) -> None:
        ingest = await self._ingest(blob)
        if ingest is None:
            return
        try:
            resumed = ingest.offset > 0
            await self._receive(what, registry, ingest, progress)
            try:
                await _in_thread(ingest.commit)
                return
            except DigestMismatch:
                if not resumed:
                    raise
        finally:
            ingest.close()
        await self._download(what, registry, blob, progress)  # an old beginning was wrong: whole, this once

    async def _ingest(self, blob: Descriptor) -> Ingest | None:
        waiting = asyncio.ensure_future(asyncio.to_thread(self._content.ingest, blob))
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            ingest = await waiting  # another process may hold the blob; ours must not be left open
            if ingest is not None:
                ingest.close()
            raise

    async def _receive(self, what: str, registry: Registry, ingest: Ingest, progress: Progress) -> None:
        """All bytes of the blob into `ingest`, over as many connections as it takes. Raises PullStalled when they bring nothing more."""
        blob, fruitless, last, furthest = ingest.descriptor, 0, "", ingest.offset
        while ingest.offset < blob.size:
            try:
                await self._stretch(registry, ingest, progress)
                if ingest.offset >= blob.size:
                    return
                last = f"{registry.host} ended the transfer early"
                pause = registry.pause(fruitless, Broken(Failure(what=what, cause=last)))
            except Broken as broken:
                last, pause = broken.failure.cause, registry.pause(fruitless, broken)
            fruitless = 0 if ingest.offset - furthest >= _PROGRESS else fruitless + 1
            furthest = max(furthest, ingest.offset)  # not the last try's: a server without ranges would break off there for ever
            if fruitless >= self._patience.attempts:
                raise PullStalled(
                    what=what,
                    cause=f"blob {blob.digest} from {registry.host}: {ingest.offset} of {blob.size} bytes after {fruitless} tries"
                    f" without progress: {last}",
                    remedy="try again: the pull goes on where it stopped; `nacre doctor` looks at the network",
                )
            await asyncio.sleep(pause)

    async def _stretch(self, registry: Registry, ingest: Ingest, progress: Progress) -> None:
        """What one connection brings."""
        blob, pending = ingest.descriptor, bytearray()
        try:
            async with registry.blob(blob, ingest.offset) as (start, pieces):
                from_start = start != ingest.offset  # it knows no ranges
                async for piece in pieces:
                    if from_start:  # not before: what we have goes only for bytes that came
                        await _in_thread(ingest.restart)
                        from_start = False
                    pending += piece
                    if len(pending) >= _WRITTEN_AT_ONCE:
                        data, pending = bytes(pending), bytearray()
                        await _in_thread(ingest.write, data)
                    progress(blob.digest, ingest.offset + len(pending), blob.size)
        finally:
            if pending:
                await _in_thread(ingest.write, bytes(pending))


async def _wait(shared: _Shared) -> None:
    """Wait for shared work; the last to leave takes it along."""
    shared.waiters += 1
    try:
        await asyncio.shield(shared.task)
    finally:
        shared.waiters -= 1
        if shared.waiters == 0 and not shared.task.done():
            shared.left = True
            shared.task.cancel()
            await asyncio.wait([shared.task])


def _take_out(table: dict[K, _Shared], key: K, shared: _Shared) -> None:
    if table.get(key) is shared:
        del table[key]


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As asyncio.to_thread, but never left running: who closes the file afterwards must be alone with it."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
