"""A docker-archive of one layer made from files of this machine: what proof pods and benchmarks run, without any registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write(path: str, tags: Sequence[str], layer: bytes, *, entrypoint: Sequence[str], made_by: str) -> None:
    """Write the archive (Docker image specification v1.2, "Combined Image JSON + Filesystem Changeset Format") to `path`."""
    settings = {
        "architecture": ARCHITECTURES[os.uname().machine],
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created_by": made_by}],
    }
    written = json.dumps(settings).encode()
    name = f"{hashlib.sha256(written).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": list(tags), "Layers": ["layer.tar"]}]).encode()
    with open(path, "wb") as file:
        file.write(tar({"layer.tar": layer, name: written, "manifest.json": manifest}))


def tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """An uncompressed tar of executable files and symbolic links (name → target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            made.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            made.addfile(entry)
    return buffer.getvalue()
