"""The pods of this node: their records, their shims, and what every RPC needs of both.

`Pods` owns the connections to the shims. It hears of exits and of lost sandboxes, writes them to the store, and wakes who waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nacre.config import Config
from nacre.cri.shims import Connection, Zygote, connect
from nacre.cri.store import ContainerRecord, SandboxRecord, Store
from nacre.images import Store as Images
from nacre.linux import cgroups
from nacre.network import Network
from nacre.oci import trace
from nacre.oci.errors import Failure, decode, encode
from nacre.wire import cri_pb2 as cri

log = logging.getLogger("nacre.cri")
Listener = Callable[[str, Any], None]  # (event, record)


class Pods:
    """Everything that sandboxes and containers share."""

    def __init__(self, config: Config, store: Store, zygote: Zygote, network: Network, images: Images) -> None:
        self.config, self.store, self.zygote, self.network, self.images = config, store, zygote, network, images
        self.connections: dict[str, Connection] = {}
        self.listeners: list[Listener] = []
        self.layout = cgroups.discover()
        self._ends: dict[str, asyncio.Event] = {}  # container id → set at its end
        self._exec_ends: dict[tuple[str, str], asyncio.Future[dict[str, Any]]] = {}

    def directory(self, sandbox: str) -> str:
        return f"{self.config.state}/pods/{sandbox}"

    def connection(self, sandbox: str) -> Connection:
        found = self.connections.get(sandbox)
        if found is None or found.closed:
            raise Failure(what=f"reach pod sandbox {sandbox[:12]}", cause="its shim is gone", remedy="remove the pod sandbox")
        return found

    async def spawn(self, sandbox: str, handler: str) -> Connection:
        made = await self.zygote.spawn(
            self.directory(sandbox), handler, lambda event: self._event(sandbox, event), lambda: self._closed(sandbox)
        )
        self.connections[sandbox] = made
        return made

    def reconnect(self, sandbox: str) -> Connection:
        """To the shim of a former daemon. Raises OSError when none listens."""
        path = f"{self.directory(sandbox)}/shim.sock"
        made = connect(path, lambda event: self._event(sandbox, event), lambda: self._closed(sandbox))
        self.connections[sandbox] = made
        return made

    def forget(self, sandbox: str) -> None:
        """The sandbox is gone: its connection and its directory with it."""
        connection = self.connections.pop(sandbox, None)
        if connection is not None:
            connection.close()
        shutil.rmtree(self.directory(sandbox), ignore_errors=False) if os.path.isdir(self.directory(sandbox)) else None

    def ended(self, container: str) -> asyncio.Event:
        return self._ends.setdefault(container, asyncio.Event())

    def exec_end(self, container: str, exec_id: str) -> asyncio.Future[dict[str, Any]]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._exec_ends[container, exec_id] = future
        future.add_done_callback(lambda _future: self._exec_ends.pop((container, exec_id), None))
        return future

    def tell(self, event: str, record: SandboxRecord | ContainerRecord) -> None:
        for listener in list(self.listeners):
            listener(event, record)

    def record(self, sandbox: SandboxRecord | None, joint: str, what: str, document: Any, took_ns: int | None = None) -> None:
        if sandbox is not None and sandbox.name[2]:
            trace.record(self.config.trace_dir, sandbox.name[2], joint, what, document, took_ns=took_ns)

    async def note_exit(self, container: str, end: dict[str, Any]) -> None:
        """A container's process has ended: kept, told, and whoever waits is woken."""
        record = self.store.containers.get(container)
        if record is None or record.finished_at:
            self.ended(container).set()
            return
        failure = decode(end["failure"]) if end.get("failure") else None
        reason = failure.code if failure else "OOMKilled" if end["oom_killed"] else "Completed" if end["code"] == 0 else "Error"
        changed = replace(
            record,
            started_at=record.started_at or end["at_ns"],
            finished_at=end["at_ns"],
            exit_code=end["code"],
            reason=reason,
            message=failure.sentence() if failure else "",
        )
        await self.store.put(changed)
        self.ended(container).set()
        self.tell("stopped", changed)

    async def note_lost(self, sandbox: str, failure: Failure) -> None:
        record = self.store.sandboxes.get(sandbox)
        if record is not None and record.ready:
            self.record(record, "failure", failure.what, encode(failure))
            await self.store.change(record, ready=False, failure=encode(failure))

    def _event(self, sandbox: str, event: dict[str, Any]) -> None:
        if event["event"] == "exited":
            _background(self.note_exit(event["container"], event))
        elif event["event"] == "exec_exited":
            waiting = self._exec_ends.get((event["container"], event["exec_id"]))
            if waiting is not None and not waiting.done():
                waiting.set_result(event)
        elif event["event"] == "sandbox_lost":
            _background(self.note_lost(sandbox, decode(event["failure"])))

    def _closed(self, sandbox: str) -> None:
        """A shim hung up. Unless it was asked to, it died, and its pod is ended with it."""
        if self.connections.get(sandbox) is not None and sandbox in self.store.sandboxes and self.store.sandboxes[sandbox].ready:
            _background(self.shim_died(self.store.sandboxes[sandbox]))

    async def shim_died(self, record: SandboxRecord) -> None:
        """Nothing of a pod outlives its shim: kill its cgroup, keep exit codes already written, 137 for the rest."""
        failure = Failure(
            what=f"supervise pod {record.name[1]}/{record.name[0]}", cause="its shim died", remedy="the pod is made anew"
        )
        for container in self.store.containers_of(record.id):
            await asyncio.to_thread(cgroups.Cgroup(self.layout, self.cgroup_path(record, container.id)).kill)
            await self.note_exit(container.id, _kept_exit(self.directory(record.id), container.id, failure))
        await self.note_lost(record.id, failure)

    def cgroup_path(self, record: SandboxRecord, container: str = "") -> str:
        parent = cri.PodSandboxConfig.FromString(record.config).linux.cgroup_parent or f"{self.config.cgroup_root}/pods"
        return f"{parent}/{container or record.id}"


def _kept_exit(directory: str, container: str, failure: Failure) -> dict[str, Any]:
    try:
        with open(f"{directory}/containers/{container}/exit.json", "rb") as file:
            document: dict[str, Any] = json.load(file)
            return document
    except (OSError, ValueError):
        unknown = encode(failure) | {"code": "ContainerStatusUnknown"}
        return {"code": 137, "at_ns": time.time_ns(), "oom_killed": False, "failure": unknown}


_tasks: set[asyncio.Task[None]] = set()


def _background(work: Any) -> None:
    """A task of its own, kept until it ends; what it raises is logged with its traceback."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_finished)


def _finished(task: asyncio.Task[None]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("in the background: %s", task.exception(), exc_info=task.exception())
