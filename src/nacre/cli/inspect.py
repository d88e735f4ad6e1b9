"""`nacre inspect`: one archive for someone who helps from afar. Secrets are masked, what is in it is listed."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from nacre.cli import host, node, output
from nacre.cli.doctor import examine
from nacre.cli.doctor.finding import document
from nacre.cli.privilege import require_root
from nacre.config import Config
from nacre.oci.errors import Failure
from nacre.oci.trace import mask

KINDS = (
    "/api/v1/nodes",
    "/api/v1/pods",
    "/api/v1/events",
    "/api/v1/namespaces",
    "/api/v1/configmaps",
    "/api/v1/serviceaccounts",
    "/apis/node.k8s.io/v1/runtimeclasses",
)  # Secrets stay where they are
LOG_TAIL = 2 << 20  # bytes of each log


@click.command()
@click.option("-o", "target", metavar="FILE", help="Default: ./nacre-inspect-TIME.tar.gz")
@click.pass_obj
def inspect(config: Config, target: str | None) -> None:
    """One archive of logs, records and state, secrets masked."""
    require_root("collect the node's state")
    name = target or f"nacre-inspect-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz"
    with (
        open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file,
        tarfile.open(fileobj=file, mode="w:gz") as archive,
    ):
        for member, content in collect(config):
            entry = tarfile.TarInfo(f"nacre-inspect/{member}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(content))
            output.say(f"  {member}  {output.size(len(content))}", "dim")
    output.say(f"{name}: {output.size(os.stat(name).st_size)}")


def collect(config: Config) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every member; a part that cannot be had says why in its place."""
    parts: dict[str, Callable[[], Any]] = {
        "doctor.json": lambda: [document(found) for found in examine(config)],
        "node.json": lambda: node.read_identity(config),
        "host.json": lambda: host.document(host.census(config)) | {"sysctls": host.sysctls()},
    }
    for member, make in parts.items():
        yield member, _json(make)
    yield from _files(config)
    for path in KINDS:
        yield f"api/{path.rsplit('/', 1)[1]}.json", _json(lambda path=path: _objects(config, path))  # type: ignore[misc]


def _json(make: Callable[[], Any]) -> bytes:
    try:
        return json.dumps(mask(make()), indent=1, default=str).encode()
    except (Failure, OSError) as error:
        return json.dumps({"missing": str(error)}).encode()


def _objects(config: Config, path: str) -> Any:
    from nacre.cli import cluster

    return cluster.get(config, path)


def _files(config: Config) -> Iterator[tuple[str, bytes]]:
    logs = os.path.dirname(config.log_dir)
    for directory, suffix, prefix in ((logs, ".log", "logs"), (config.trace_dir, ".jsonl", "trace")):
        if os.path.isdir(directory):
            for name in sorted(os.listdir(directory)):
                if name.endswith(suffix):
                    yield f"{prefix}/{name}", _tail(f"{directory}/{name}")
    settings = f"{config.etc}/config.toml"
    if os.path.exists(settings):
        yield "config.toml", _tail(settings)


def _tail(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
        return file.read()
