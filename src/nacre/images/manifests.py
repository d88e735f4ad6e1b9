"""Indexes, manifests and configurations: decoded once, checked, turned into values. OCI image spec; Docker manifest v2 schema 2.

What comes in is hostile JSON of bounded size; what goes out has digests that may become file names and sizes that are numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nacre.images.errors import ImageRefused, NoMatchingPlatform
from nacre.images.model import Descriptor, is_digest
from nacre.oci.errors import Unsupported

MANIFEST_LIMIT = 4 << 20  # as containerd's
CONFIG_LIMIT = 8 << 20
LAYER_COUNT_LIMIT = 512  # overlayfs takes 500 lower layers
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
INDEXES = (OCI_INDEX, DOCKER_LIST)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
ACCEPT = ", ".join((*INDEXES, *MANIFESTS))
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
_MACHINES = {"x86_64": ("amd64", ""), "aarch64": ("arm64", "v8"), "armv7l": ("arm", "v7"), "riscv64": ("riscv64", "")}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image's manifest."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(word for word in (self.os, self.architecture, self.variant) if word)

    def fits(self, other: Platform) -> bool:
        """Whether an image for `other` runs here; a variant that either side leaves open does not matter."""
        same = (self.os, self.architecture) == (other.os, other.architecture)
        return same and (not self.variant or not other.variant or self.variant == other.variant)


def host_platform() -> Platform:
    machine = os.uname().machine
    return Platform("linux", *_MACHINES.get(machine, (machine, "")))


def decode(what: str, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ImageRefused."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageRefused(what=what, cause=f"it is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ImageRefused(what=what, cause=f"it is a JSON {type(document).__name__}, not an object")
    return document


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def kind_of(what: str, document: dict[str, Any], media_type: str = "") -> str:
    """One of INDEXES or MANIFESTS: from the document itself, else from `media_type` (the HTTP header), else by its shape."""
    said = str(document.get("mediaType") or media_type).split(";")[0].strip()
    if said.startswith(_SCHEMA_1) or document.get("schemaVersion") == 1:
        cause = "the manifest is of Docker's schema 1, given up by registries in 2019"
        raise Unsupported(what=what, cause=cause, remedy="push the image again with a current docker, podman or skopeo")
    if said in (*INDEXES, *MANIFESTS):
        return said
    if "manifests" in document:
        return OCI_INDEX
    if "config" in document and "layers" in document:
        return OCI_MANIFEST
    raise ImageRefused(what=what, cause=f"media type {said or '(none)'} is no image manifest")


def descriptor(what: str, document: Any, where: str) -> Descriptor:
    """A checked descriptor; `where` is its place in the document, for the message."""
    if not isinstance(document, dict):
        raise ImageRefused(what=what, cause=f"{where} is no descriptor")
    digest, size = document.get("digest"), document.get("size")
    if not is_digest(digest):
        raise ImageRefused(what=what, cause=f"{where}.digest {str(digest)[:100]!r} is no sha256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise ImageRefused(what=what, cause=f"{where}.size {str(size)[:40]!r} is no size")
    return Descriptor(str(document.get("mediaType", "")), str(digest), size)


def choose(what: str, index: dict[str, Any], host: Platform) -> Descriptor:
    """The entry for `host`. Raises NoMatchingPlatform, which lists what there is."""
    entries = index.get("manifests")
    if not isinstance(entries, list):
        raise ImageRefused(what=what, cause="manifests is no list")
    has: list[str] = []
    loose: Descriptor | None = None
    for number, entry in enumerate(entries):
        found = descriptor(what, entry, f"manifests[{number}]")
        if found.media_type and found.media_type not in (*INDEXES, *MANIFESTS):
            continue
        given = entry.get("platform")
        if not isinstance(given, dict):
            loose = loose or found  # an index of one image, as `skopeo copy oci:` writes it
            continue
        offered = Platform(str(given.get("os", "")), str(given.get("architecture", "")), str(given.get("variant") or ""))
        if host.fits(offered):
            return found
        if offered.os != "unknown":  # attestations say unknown/unknown
            has.append(str(offered))
    if loose is not None:
        return loose
    raise _no_match(what, host, has)


def _no_match(what: str, host: Platform, has: Sequence[str]) -> NoMatchingPlatform:
    listed = ", ".join(dict.fromkeys(has)) or "none"
    return NoMatchingPlatform(
        what=what,
        cause=f"no match for platform {host} in manifest: has {listed}",
        remedy=f"use a tag that is built for {host}, or build the image for it",
    )


def manifest(what: str, document: dict[str, Any]) -> Manifest:
    """Config and layers. Raises ImageRefused for what is no container image, Unsupported for layers kept elsewhere."""
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise ImageRefused(what=what, cause="layers is no list")
    if len(layers) > LAYER_COUNT_LIMIT:
        raise ImageRefused(what=what, cause=f"it has {len(layers)} layers, the limit is {LAYER_COUNT_LIMIT}")
    config = descriptor(what, document.get("config"), "config")
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG, ""):
        cause = f"it holds {document.get('artifactType') or config.media_type}, not a container image"
        raise ImageRefused(what=what, cause=cause, remedy="charts, signatures and the like are for other tools")
    if config.size > CONFIG_LIMIT:  # said before it is fetched
        raise ImageRefused(what=what, cause=f"its configuration is {config.size} bytes long, the limit is {CONFIG_LIMIT}")
    found = [descriptor(what, layer, f"layers[{number}]") for number, layer in enumerate(layers)]
    for number, layer in enumerate(found):
        if "foreign" in layer.media_type or (isinstance(layers[number], dict) and layers[number].get("urls")):
            raise Unsupported(what=what, cause=f"layers[{number}] is kept outside the registry ({layer.media_type})")
        if "encrypted" in layer.media_type:
            raise Unsupported(what=what, cause=f"layers[{number}] is encrypted")
    return Manifest(config, tuple(found))


def configuration(what: str, data: bytes, layers: int, host: Platform) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the configuration, its diff_ids), the latter as many as the manifest has `layers`."""
    document = decode(what, data)
    rootfs = document.get("rootfs")
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or not all(is_digest(item) for item in ids):
        raise ImageRefused(what=what, cause="rootfs.diff_ids is no list of sha256 digests")
    if len(ids) != layers:
        raise ImageRefused(what=what, cause=f"the configuration has {len(ids)} diff_ids, the manifest {layers} layers")
    if not isinstance(document.get("config") or {}, dict):
        raise ImageRefused(what=what, cause="config is no object")
    offered = Platform(
        str(document.get("os") or host.os),
        str(document.get("architecture") or host.architecture),
        str(document.get("variant") or ""),
    )
    if not host.fits(offered):
        raise _no_match(what, host, [str(offered)])
    return document, tuple(ids)


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """OCI image spec, config.md "Layer ChainID"."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain
