"""After a start of the daemon: what the store remembers, compared with the shims that live. Each pod ends up true or ended.

A sandbox in the store whose shim answers is taken up: exits that happened meanwhile are read. One whose shim is gone is ended: nothing
of its cgroup survives, codes that were written are kept, the rest is 137. A directory below STATE/pods that the store does not know
was half made when the daemon died: its shim is told to take it away.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from nacre.cri.pods import Pods
from nacre.linux import mounts
from nacre.linux.mounts import UnmountFlag
from nacre.oci.errors import Failure

log = logging.getLogger("nacre.cri")


async def recover(pods: Pods) -> None:
    """Every pod of the store and of the state directory. Raises nothing for one pod's trouble: it is logged and the pod ended."""
    base = f"{pods.config.state}/pods"
    os.makedirs(base, mode=0o711, exist_ok=True)
    for record in list(pods.store.sandboxes.values()):
        if record.ready:
            await _take_up(pods, record)
    for name in os.listdir(base):
        if name not in pods.store.sandboxes:
            await _take_away(pods, name)
    await asyncio.to_thread(pods.network.collect, {record.id for record in pods.store.sandboxes.values() if record.ready})


async def _take_up(pods: Pods, record: Any) -> None:
    try:
        connection = pods.reconnect(record.id)
        state, _none = await connection.ask("state")
    except (OSError, Failure) as error:
        log.warning("pod %s/%s: its shim does not answer (%s); the pod is ended", record.name[1], record.name[0], error)
        await pods.shim_died(record)
        _unmount_below(pods.directory(record.id))
        return
    for container in pods.store.containers_of(record.id):
        held = state["containers"].get(container.id)
        if held is not None and held["exit"]:
            await pods.note_exit(container.id, held["exit"])
    if state["lost"]:
        from nacre.oci.errors import decode

        await pods.note_lost(record.id, decode(state["lost"]))
    for container_id in set(state["containers"]) - {one.id for one in pods.store.containers_of(record.id)}:
        await connection.ask("kill", container=container_id, signal=9, everyone=True)
        await connection.ask("delete", container=container_id)
        pods.images.release(container_id)


async def _take_away(pods: Pods, name: str) -> None:
    try:
        connection = pods.reconnect(name)
        state, _none = await connection.ask("state")
        for container in state["containers"]:
            await connection.ask("kill", container=container, signal=9, everyone=True)
            await connection.ask("delete", container=container)
        await connection.ask("destroy")
    except (OSError, Failure) as error:
        log.warning("half-made pod %s: %s; its mounts are taken away", name[:12], error)
    _unmount_below(pods.directory(name))
    pods.forget(name)


def _unmount_below(directory: str) -> None:
    """Whatever a dead shim left mounted there, deepest first."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4] for line in file]
    for point in sorted((point for point in points if point.startswith(directory + "/")), reverse=True):
        mounts.umount2(point, UnmountFlag.DETACH)
