"""After a start of the daemon: what the store remembers, compared with the shims that live. Each pod ends up true or ended.

A sandbox in the store whose shim answers is taken up: exits that happened meanwhile are read. One whose shim is gone is ended: nothing
of its cgroup survives, codes that were written are kept, the rest is 137. A directory below STATE/pods that the store does not know
was half made when the daemon died: its shim is told to take it away.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Coroutine
from typing import Any

from nacre.cri.pods import Pods
from nacre.cri.shims import Connection
from nacre.cri.store import SandboxRecord
from nacre.linux import cgroup_names
from nacre.oci.errors import Failure
from nacre.wire import cri_pb2 as cri

log = logging.getLogger("nacre.cri")


async def recover(pods: Pods) -> None:
    """Every pod of the store and of the state directory. Raises nothing for one pod's trouble: it is logged and the pod ended."""
    base = f"{pods.config.state}/pods"
    os.makedirs(base, mode=0o711, exist_ok=True)
    for record in list(pods.store.sandboxes.values()):
        await _guarded(record.id, pods.take_up(record) if record.ready else _finish_stop(pods, record))
    for name in os.listdir(base):
        if name not in pods.store.sandboxes:
            await _guarded(name, _take_away(pods, name))
    for container in set(pods.images.snapshots()) - set(pods.store.containers):
        pods.images.release(container)
    await asyncio.to_thread(pods.network.collect, {record.id for record in pods.store.sandboxes.values() if record.ready})


async def _guarded(name: str, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except (OSError, Failure) as error:
        log.error("pod sandbox %s: %s", name[:12], error, exc_info=error)


async def _finish_stop(pods: Pods, record: SandboxRecord) -> None:
    """NOTREADY was written, then the daemon died: what StopPodSandbox had begun is ended."""
    try:
        connection = pods.reconnect(record.id)
    except OSError:  # the usual case: it was stopped whole
        await pods.clear(record)
        return
    await _end(pods, connection, record.id)
    await pods.clear(record)


async def _take_away(pods: Pods, name: str) -> None:
    """Half made when the daemon died: its caller was told nothing, so nothing of it stays."""
    try:
        await _end(pods, pods.reconnect(name), name)
    except (OSError, Failure) as error:
        log.warning("half-made pod sandbox %s: %s; what is left of it is taken away", name[:12], error)
    record = SandboxRecord(id=name, config=_config(pods.directory(name)), handler="runc", name=("", "", "", 0), created_at=0)
    await pods.clear(record)
    await asyncio.to_thread(pods.network.detach, name)
    pods.forget(name)


async def _end(pods: Pods, connection: Connection, sandbox: str) -> None:
    state, _none = await connection.ask("state")
    for container in state["containers"]:
        await pods.discard(connection, pods.directory(sandbox), container)
    pods.connections.pop(sandbox, None)
    await connection.ask("destroy")
    connection.close()


def _config(directory: str) -> bytes:
    """What a pod that no record has was asked to be, as far as its cgroup goes."""
    try:
        with open(f"{directory}/sandbox.json", "rb") as file:
            parent = json.load(file)["cgroups_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return b""
    if cgroup_names.name_in(*os.path.split(parent)) == os.path.basename(directory):
        return b""  # our own, as no caller named one
    data: bytes = cri.PodSandboxConfig(linux=cri.LinuxPodSandboxConfig(cgroup_parent=parent)).SerializeToString()
    return data
