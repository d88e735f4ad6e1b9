"""Images into files that other tools read: OCI layout (tar or directory) and docker-archive. Blocking."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

from nacre.images import manifests
from nacre.images.content import Content
from nacre.images.errors import full_disk_is_a_failure
from nacre.images.model import Descriptor, Image
from nacre.images.reference import parse
from nacre.images.streams import decompressed
from nacre.oci.errors import Invalid

FORMATS = ("oci", "oci-dir", "docker")
Put = Callable[[str, int, Any], None]  # (member, size in bytes, source)


def export(content: Content, images: Sequence[tuple[str, Image]], path: str, format: str) -> None:
    """Write `images`, each with the name it was asked for by, to `path`. A tar appears under its name only when it is whole."""
    if format not in FORMATS:
        raise Invalid(what=f"export to {path}", cause=f"format {format!r}", remedy=f"formats: {', '.join(FORMATS)}")
    with full_disk_is_a_failure(f"export to {path}", os.path.dirname(os.path.abspath(path))):
        if format == "oci-dir":
            os.makedirs(path, exist_ok=True)
            _layout(content, images, _into_directory(path))
            return
        new = f"{path}.new"
        try:
            with open(new, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                (_layout if format == "oci" else _docker)(content, images, _into_tar(tar))
            os.rename(new, path)
        finally:
            try:
                os.unlink(new)
            except FileNotFoundError:
                pass


def _into_tar(tar: tarfile.TarFile) -> Put:
    def put(name: str, size: int, source: Any) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        tar.addfile(member, source)

    return put


def _into_directory(path: str) -> Put:
    def put(name: str, size: int, source: Any) -> None:
        target = os.path.join(path, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            while size > 0 and (piece := source.read(min(1 << 20, size))):
                file.write(piece)
                size -= len(piece)

    return put


def _layout(content: Content, images: Sequence[tuple[str, Image]], put: Put) -> None:
    _put_json(put, "oci-layout", {"imageLayoutVersion": "1.0.0"})
    entries: list[dict[str, Any]] = []
    written: set[str] = set()
    for name, image in images:
        for blob in (image.manifest, image.config_blob, *(layer.blob for layer in image.layers)):
            if blob.digest not in written:
                _put_blob(content, put, f"blobs/{blob.digest.replace(':', '/')}", blob)
                written.add(blob.digest)
        entry = image.manifest.document()
        for full in _names(name, image):
            annotations = {"io.containerd.image.name": full, "org.opencontainers.image.ref.name": full}
            entries.append(entry | {"annotations": annotations})
    _put_json(put, "index.json", {"schemaVersion": 2, "mediaType": manifests.OCI_INDEX, "manifests": entries})


def _docker(content: Content, images: Sequence[tuple[str, Image]], put: Put) -> None:
    """What `docker load` takes: layers uncompressed and named by diff_id, as `docker save` has them."""
    listed: list[dict[str, Any]] = []
    written: set[str] = set()
    for name, image in images:
        config = f"{image.id.removeprefix('sha256:')}.json"
        if config not in written:
            _put_blob(content, put, config, image.config_blob)
            written.add(config)
        names: list[str] = []
        for layer in image.layers:
            member = f"{layer.diff_id.removeprefix('sha256:')}.tar"
            names.append(member)
            if member not in written:
                with content.open(layer.blob) as blob:
                    put(member, layer.stream_bytes, _Exact(decompressed(blob)))
                written.add(member)
        listed.append({"Config": config, "RepoTags": _names(name, image), "Layers": names})
    _put_json(put, "manifest.json", listed)


class _Exact:
    """A source whose `read(n)` answers n bytes unless it ends: what tarfile copies from."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def read(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size > 0 and (piece := self._source.read(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def _names(name: str, image: Image) -> list[str]:
    """The name asked for; all of the image's when it was asked for by id."""
    if name.removeprefix("sha256:") in image.id:
        return list(image.references)
    reference = parse(name)
    return [str(reference)] if not reference.digest else list(image.references)


def _put_json(put: Put, name: str, document: Any) -> None:
    data = json.dumps(document, separators=(",", ":")).encode()
    put(name, len(data), io.BytesIO(data))


def _put_blob(content: Content, put: Put, name: str, blob: Descriptor) -> None:
    with content.open(blob) as source:
        put(name, blob.size, source)
