"""Images in files: OCI layouts (directory or tar, OCI image spec, image-layout.md) and docker-archives (`docker save`).

Import reads an archive's members by name and offset and stores blobs under digests it computes itself: no name in an archive ever
becomes a path. Export writes what every other tool reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from nacre.images import manifests
from nacre.images.content import Content
from nacre.images.errors import DigestMismatch, ImageNotFound, ImageRefused, full_disk_is_a_failure
from nacre.images.install import Installer, Job
from nacre.images.model import Descriptor, Image, is_digest
from nacre.images.places import Places
from nacre.images.reference import LOCAL_DOMAIN, parse
from nacre.images.streams import Hashed, StreamError, decompressed
from nacre.images.tarstream import Kind, Reader, TarError
from nacre.oci.errors import Failure

_PIECE = 1 << 20
_JSON_LIMIT = 16 << 20
_MEMBERS_LIMIT = 100_000
_NAME_KEYS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class Member:
    """A stretch of a file, read from its start."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file = file
        self._at = offset
        self._end = offset + size

    def read(self, size: int) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(min(size, self._end - self._at))
        self._at += len(data)
        return data


class Archive:
    """Members by name: of a tar (plain or compressed) or of a directory. Blocking."""

    def __init__(self, what: str, members: dict[str, tuple[int, int]], file: BinaryIO | None, directory: str) -> None:
        self._what = what
        self._members = members
        self._file = file
        self._directory = directory

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Any, int]]:
        """(source, size) of a member. Raises ImageRefused when there is none."""
        if name not in self._members:
            raise ImageRefused(what=self._what, cause=f"it has no member {name[:200]!r}")
        offset, size = self._members[name]
        if self._file is not None:
            yield Member(self._file, offset, size), size
            return
        with open(os.path.join(self._directory, name), "rb") as file:
            yield file, size

    def json(self, name: str) -> Any:
        with self.open(name) as (source, size):
            if size > _JSON_LIMIT:
                raise ImageRefused(what=self._what, cause=f"{name} is {size} bytes long, the limit is {_JSON_LIMIT}")
            data = _read_all(source, size)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageRefused(what=self._what, cause=f"{name} is no JSON: {error}") from error


@contextmanager
def open_archive(path: str, places: Places) -> Iterator[Archive]:
    """The archive at `path`. A compressed tar is decompressed below DATA first, for the time of the block."""
    what = f"import {path}"
    try:
        if os.path.isdir(path):
            yield Archive(what, dict(_walk(path)), None, path)
            return
        with open(path, "rb") as raw, tempfile.TemporaryFile(dir=places.ingest) as plain:
            source = decompressed(raw)
            if source is raw:
                yield Archive(what, _members(raw), raw, "")
                return
            with full_disk_is_a_failure(what, places.ingest):
                while piece := source.read(_PIECE):
                    plain.write(piece)
            plain.seek(0)
            yield Archive(what, _members(plain), plain, "")
    except (TarError, StreamError) as error:
        raise ImageRefused(what=what, cause=f"it is no image archive: {error}") from error
    except FileNotFoundError as error:
        raise ImageNotFound(what=what, cause=f"no such file or directory: {error.filename}") from error


def _walk(path: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Members of a layout directory; links are not followed."""
    for head, _, names in os.walk(path):
        for name in names:
            found = os.lstat(os.path.join(head, name))
            yield os.path.relpath(os.path.join(head, name), path), (0, found.st_size)


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name → (offset, size) of every file in a tar; links inside it (`docker save` of old) lead to their target."""
    members: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    for entry in Reader(file):
        name = os.path.normpath(entry.name)
        if entry.kind is Kind.FILE and entry.sparse is None:
            members[name] = (file.tell(), entry.stored)
        elif entry.kind is Kind.SYMLINK:
            links[name] = os.path.normpath(os.path.join(os.path.dirname(name), entry.target))
        elif entry.kind is Kind.HARDLINK:
            links[name] = os.path.normpath(entry.target)
        if len(members) + len(links) > _MEMBERS_LIMIT:
            raise TarError(name, f"more than {_MEMBERS_LIMIT} members")
    return members | {name: members[target] for name, target in links.items() if target in members and name not in members}


def _read_all(source: Any, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := source.read(size - len(data))):
        data += piece
    return data


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image found in an archive: its manifest is in the content store, its blobs are still in the archive, at `members`."""

    manifest: Descriptor
    names: tuple[str, ...]
    members: dict[str, str]  # digest → member


class Importer:
    """Brings archives into a store."""

    def __init__(self, places: Places, content: Content, installer: Installer, host: manifests.Platform) -> None:
        self._places = places
        self._content = content
        self._installer = installer
        self._host = host

    async def run(self, path: str, name: str) -> list[Image]:
        """Every image of the archive; `name` replaces the names of the only one. The caller holds the shared lock."""
        what = f"import {path}"
        context = open_archive(path, self._places)
        archive = await asyncio.to_thread(context.__enter__)
        try:
            candidates = await asyncio.to_thread(self._candidates, what, archive)
            if name and len(candidates) != 1:
                raise ImageRefused(what=what, cause=f"it has {len(candidates)} images, so it cannot be named {name}")
            return [await self._install(what, path, archive, candidate, name) for candidate in candidates]
        except (TarError, StreamError) as error:
            raise ImageRefused(what=what, cause=f"it is no image archive: {error}") from error
        finally:
            await asyncio.to_thread(context.__exit__, None, None, None)

    async def _install(self, what: str, path: str, archive: Archive, candidate: Candidate, name: str) -> Image:
        async def fetch(blob: Descriptor) -> None:
            await asyncio.to_thread(self._store, archive, candidate.members.get(blob.digest, _blob_member(blob.digest)), blob)

        names = (name,) if name else candidate.names
        if not names:
            stem = os.path.basename(path.rstrip("/")).split(".")[0].lower()
            names = (f"{LOCAL_DOMAIN}/{stem or 'imported'}",)
        references = [parse(one) for one in names]
        digests = dict.fromkeys(reference.pinned(candidate.manifest.digest) for reference in references)
        tags = tuple(str(reference) for reference in references if not reference.digest)
        job = Job(what=what, manifest=candidate.manifest, references=tags, digests=tuple(digests))
        return await self._installer.install(job, fetch)

    def _candidates(self, what: str, archive: Archive) -> list[Candidate]:
        if "index.json" in archive:
            found = list(self._from_layout(what, archive))
        elif "manifest.json" in archive:
            found = list(self._from_docker(what, archive))
        else:
            cause = "it has neither index.json (OCI layout) nor manifest.json (docker-archive)"
            raise ImageRefused(what=what, cause=cause, remedy="make it with `docker save` or `skopeo copy … oci-archive:FILE`")
        if not found:
            raise ImageRefused(what=what, cause="it lists no image")
        return found

    def _from_layout(self, what: str, archive: Archive) -> Iterator[Candidate]:
        entries = archive.json("index.json").get("manifests")
        if not isinstance(entries, list):
            raise ImageRefused(what=what, cause="index.json: manifests is no list")
        tags = self._docker_tags(what, archive)
        for number, entry in enumerate(entries):
            top = manifests.descriptor(what, entry, f"index.json: manifests[{number}]")
            if len(entries) > 1 and isinstance(entry.get("platform"), dict) and not self._fits(entry["platform"]):
                continue
            found = self._manifest(what, archive, top, 0)
            document = manifests.decode(what, self._content.read(found, manifests.MANIFEST_LIMIT))
            config = str((document.get("config") or {}).get("digest", ""))
            names = _annotated_names(entry) or tags.get(config, ())
            yield Candidate(found, names, {})

    def _fits(self, given: dict[str, Any]) -> bool:
        offered = manifests.Platform(str(given.get("os")), str(given.get("architecture")), str(given.get("variant") or ""))
        return self._host.fits(offered)

    def _manifest(self, what: str, archive: Archive, top: Descriptor, depth: int) -> Descriptor:
        """Store the manifest that `top` leads to, through indexes."""
        with archive.open(_blob_member(top.digest)) as (source, size):
            if size > manifests.MANIFEST_LIMIT:
                raise ImageRefused(what=what, cause=f"manifest {top.digest} is {size} bytes long")
            data = _read_all(source, size)
        if manifests.digest_of(data) != top.digest:
            raise DigestMismatch(what=what, cause=f"member {_blob_member(top.digest)} is {manifests.digest_of(data)}")
        document = manifests.decode(what, data)
        kind = manifests.kind_of(what, document, top.media_type)
        if kind in manifests.MANIFESTS:
            return self._content.put(data, kind)
        if depth > 2:
            raise ImageRefused(what=what, cause="an index of an index of an index")
        return self._manifest(what, archive, manifests.choose(what, document, self._host), depth + 1)

    def _docker_tags(self, what: str, archive: Archive) -> dict[str, tuple[str, ...]]:
        """Configuration digest → names, from the manifest.json that `docker save` writes beside index.json."""
        if "manifest.json" not in archive:
            return {}
        tags: dict[str, tuple[str, ...]] = {}
        for entry in archive.json("manifest.json"):
            config = os.path.basename(str(entry.get("Config", ""))).removesuffix(".json")
            tags[f"sha256:{config}"] = tuple(str(tag) for tag in entry.get("RepoTags") or ())
        return tags

    def _from_docker(self, what: str, archive: Archive) -> Iterator[Candidate]:
        """docker-archive: a manifest is made from its configuration and its layers, whose digests are computed here."""
        entries = archive.json("manifest.json")
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            names = entry.get("Layers") if isinstance(entry, dict) else None
            if not isinstance(names, list) or not isinstance(entry.get("Config"), str):
                raise ImageRefused(what=what, cause=f"manifest.json[{number}] has no Config or no Layers")
            members: dict[str, str] = {}
            config = self._describe(archive, entry["Config"], manifests.OCI_CONFIG, members)
            layers = [self._describe(archive, str(name), manifests.OCI_LAYER, members) for name in names]
            document = {
                "schemaVersion": 2,
                "mediaType": manifests.OCI_MANIFEST,
                "config": config.document(),
                "layers": [layer.document() for layer in layers],
            }
            data = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
            tags = tuple(str(tag) for tag in entry.get("RepoTags") or ())
            yield Candidate(self._content.put(data, manifests.OCI_MANIFEST), tags, members)

    def _describe(self, archive: Archive, name: str, media_type: str, members: dict[str, str]) -> Descriptor:
        name = os.path.normpath(name)
        with archive.open(name) as (source, size):
            hashed = Hashed(source, size)
            head = hashed.read(4)
            while hashed.read(_PIECE):
                pass
        members[hashed.digest] = name
        suffix = {b"\x1f\x8b": "+gzip", b"\x28\xb5": "+zstd"}.get(head[:2], "") if media_type == manifests.OCI_LAYER else ""
        return Descriptor(media_type + suffix, hashed.digest, hashed.size)

    def _store(self, archive: Archive, member: str, blob: Descriptor) -> None:
        ingest = self._content.ingest(blob)
        if ingest is None:
            return
        try:
            ingest.restart()
            with archive.open(member) as (source, _):
                while piece := source.read(_PIECE):
                    ingest.write(piece)
            ingest.commit()
        except BaseException:
            ingest.discard()
            raise
        finally:
            ingest.close()


def _blob_member(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _annotated_names(entry: dict[str, Any]) -> tuple[str, ...]:
    """Names that an index's annotations give; a bare tag, as skopeo writes for `oci:DIR:TAG`, is no name."""
    annotations = entry.get("annotations")
    if not isinstance(annotations, dict):
        return ()
    for key in _NAME_KEYS:
        text = annotations.get(key)
        if isinstance(text, str) and ("/" in text or ":" in text) and not is_digest(text):
            try:
                parse(text)
            except Failure:
                continue
            return (text,)
    return ()
