"""Images made in a test: layers from lists of entries, docker-archives, and a store under a prefix of its own."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nacre import config
from nacre.images import Store
from nacre.images.manifests import host_platform

Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, data: bytes = b"", **fields: Any) -> Member:
    return entry(name, tarfile.REGTYPE, data, **{"mode": 0o644, **fields})


def directory(name: str, **fields: Any) -> Member:
    return entry(name, tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str) -> Member:
    return entry(name, tarfile.SYMTYPE, linkname=target, mode=0o777)


def hardlink(name: str, target: str) -> Member:
    return entry(name, tarfile.LNKTYPE, linkname=target)


def entry(name: str, kind: bytes, data: bytes = b"", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    xattrs = fields.pop("xattrs", {})
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in xattrs.items()}
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def layer(*members: Member) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, body in members:
            tar.addfile(info, io.BytesIO(body))
    return data.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def configuration(layers: Sequence[bytes], **fields: Any) -> bytes:
    document = {
        "architecture": host_platform().architecture,
        "os": "linux",
        "config": fields,
        "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in layers]},
    }
    return json.dumps(document).encode()


def docker_archive(path: Path, layers: Sequence[bytes], names: Sequence[str] = ("t:1",), config: bytes | None = None) -> Path:
    """What `docker save` writes."""
    members = [file("config.json", config or configuration(layers))]
    members += [file(f"{number}/layer.tar", data) for number, data in enumerate(layers)]
    listed = [{"Config": "config.json", "RepoTags": list(names), "Layers": [f"{n}/layer.tar" for n in range(len(layers))]}]
    path.write_bytes(layer(*members, file("manifest.json", json.dumps(listed).encode())))
    return path


def blobs(layers: Sequence[bytes], **fields: Any) -> tuple[dict[str, bytes], bytes]:
    """(blobs by digest, manifest) of an image with gzipped layers, as a registry has it."""
    config = configuration(layers, **fields)
    packed = [gzip.compress(data, 1, mtime=0) for data in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(config), "size": len(config)},
        "layers": [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": sha256(data), "size": len(data)}
            for data in packed
        ],
    }
    return {sha256(data): data for data in (config, *packed)}, json.dumps(manifest).encode()


@asynccontextmanager
async def store(prefix: Path) -> AsyncIterator[Store]:
    opened = Store(config.load(str(prefix)))
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


def kept(prefix: Path) -> dict[str, list[str]]:
    """What of content lies below DATA: names by kind. Nothing is kept when all lists are empty."""
    images = prefix / "var/lib/nacre/images"
    return {
        "blobs": sorted(os.listdir(images / "blobs/sha256")),
        "ingest": sorted(os.listdir(images / "ingest")),
        "layers": sorted(name for name in os.listdir(images / "layers") if name != "empty"),
        "erofs": sorted(os.listdir(images / "erofs")),
        "snapshots": sorted(os.listdir(prefix / "var/lib/nacre/snapshots")),
    }


NOTHING: dict[str, list[str]] = {"blobs": [], "ingest": [], "layers": [], "erofs": [], "snapshots": []}
