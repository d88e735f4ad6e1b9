"""The pods of this node: their records, their shims, and what every RPC needs of both.

`Pods` owns the connections to the shims. It hears of exits and of lost sandboxes, writes them to the store, and wakes who waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nacre import runc
from nacre.config import Config
from nacre.cri.shims import Connection, ShimDied, Zygote, connect, roomy
from nacre.cri.store import ContainerRecord, SandboxRecord, Store
from nacre.images import Store as Images
from nacre.linux import cgroup_names, cgroup_systemd, cgroups, mounts, process
from nacre.linux.mounts import UnmountFlag
from nacre.network import Network
from nacre.oci import trace
from nacre.oci.errors import Failure, decode, encode
from nacre.wire import cri_pb2 as cri

if TYPE_CHECKING:
    from nacre.cri.vms import Vms

log = logging.getLogger("nacre.cri")
_BUNDLE = ("config.json", "exit.json", "exit.json.new", "foreign.log", "foreign.pid", "console.sock")
Listener = Callable[[str, Any], None]  # (event, record)


class LogBlocked(Failure):
    """A container's log takes no more; the container is held up until it does."""


class Pods:
    """Everything that sandboxes and containers share."""

    vms: Vms  # set once, before the first call is served

    def __init__(self, config: Config, store: Store, zygote: Zygote, network: Network, images: Images) -> None:
        self.config, self.store, self.zygote, self.network, self.images = config, store, zygote, network, images
        self.connections: dict[str, Connection] = {}
        self.listeners: list[Listener] = []
        self.layout = cgroups.discover()
        self._ends: dict[str, asyncio.Event] = {}  # container id → set at its end
        self._exec_ends: dict[tuple[str, str], asyncio.Future[dict[str, Any]]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.blocked: dict[str, str] = {}  # container id → why its log cannot be written now
        self.doing: dict[str, str] = {}  # wire.cri.progress_of what takes its time → words for who waits

    def directory(self, sandbox: str) -> str:
        return f"{self.config.state}/pods/{sandbox}"

    def connection(self, sandbox: str) -> Connection:
        found = self.connections.get(sandbox)
        if found is None or found.closed:
            raise Failure(what=f"reach pod sandbox {sandbox[:12]}", cause="its shim is gone", remedy="remove the pod sandbox")
        return found

    def lock(self, sandbox: str) -> asyncio.Lock:
        """Held while a sandbox is stopped, removed, or its shim's end is dealt with: they take turns."""
        return self._locks.setdefault(sandbox, asyncio.Lock())

    def connected(self, sandbox: str) -> Connection | None:
        found = self.connections.get(sandbox)
        return None if found is None or found.closed else found

    async def spawn(self, sandbox: str, handler: str) -> Connection:
        known = self.config.handlers.get(handler)
        kind = "foreign" if known is not None and known.binary else handler
        made = await self.zygote.spawn(
            self.directory(sandbox),
            kind,
            lambda event: self._event(sandbox, event),
            lambda: self._closed(sandbox),
            lambda: busy_with(self.directory(sandbox)),
            roomy(self.connections.values(), self.config.pods_per_shim) if kind == "runc" else None,
        )
        made.patience = self.config.patience
        self.connections[sandbox] = made
        return made

    def reconnect(self, sandbox: str) -> Connection:
        """To the shim of a former daemon. Raises OSError when none listens."""
        made = connect(
            f"{self.directory(sandbox)}/shim.sock",
            lambda event: self._event(sandbox, event),
            lambda: self._closed(sandbox),
            lambda: busy_with(self.directory(sandbox)),
        )
        made.patience = self.config.patience
        self.connections[sandbox] = made
        return made

    async def take_up(self, record: SandboxRecord) -> None:
        """Connect to the shim of a pod that should live, and hear what happened meanwhile; a pod without one is ended."""
        try:
            connection = self.reconnect(record.id)
            state, _none = await connection.ask("state")
        except (OSError, Failure) as error:
            log.warning("pod %s/%s: its shim does not answer (%s); the pod is ended", record.name[1], record.name[0], error)
            await self.shim_died(record)
            return
        known = {one.id: one for one in self.store.containers_of(record.id)}
        for name, held in state["containers"].items():
            if name not in known:  # made when the daemon died, its caller was told nothing
                await self.discard(connection, self.directory(record.id), name)
                continue
            if held["started_ns"] and not known[name].started_at:
                await self.store.change(known[name], started_at=held["started_ns"])
            if held["exit"]:
                await self.note_exit(name, held["exit"])
            self.note_blocked(name, held["blocked"])
        for name in set(known) - set(state["containers"]):
            await self.note_exit(name, kept_exit(self.directory(record.id), name, self._shim_death(record)))
        if state["lost"]:
            await self.note_lost(record.id, decode(state["lost"]))

    async def discard(self, connection: Connection, directory: str, container: str) -> None:
        """A container that no record has: off the host."""
        await connection.ask("kill", container=container, signal=9, everyone=True)
        await connection.ask("delete", container=container)
        self.images.release(container)
        remove_bundle(f"{directory}/containers/{container}")

    def document(self, sandbox: str, container: str) -> dict[str, Any]:
        """The container's config.json; {} once it is gone."""
        try:
            with open(f"{self.directory(sandbox)}/containers/{container}/config.json", "rb") as file:
                read: dict[str, Any] = json.load(file)
                return read
        except FileNotFoundError:
            return {}

    def forget(self, sandbox: str) -> None:
        """The sandbox is gone: its connection and its directory with it."""
        connection = self.connections.pop(sandbox, None)
        if connection is not None:
            connection.close()
        self._locks.pop(sandbox, None)
        unmount_below(self.directory(sandbox))  # a tree with a mount in it must never be walked
        if os.path.isdir(self.directory(sandbox)):
            shutil.rmtree(self.directory(sandbox))

    def forget_container(self, container: str) -> None:
        self._ends.pop(container, None)
        self.blocked.pop(container, None)

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
        try:
            await self.store.put(changed)
        finally:  # who waits for the end must not wait for the disk; exit.json has it for the next daemon
            self.ended(container).set()
            self.tell("stopped", changed)

    def note_blocked(self, container: str, why: str) -> None:
        """The container's log can not be written (again): its status says so, and the recorder."""
        record = self.store.containers.get(container)
        if record is None or why == self.blocked.get(container, ""):
            return
        if not why:
            log.info("the log %s is written again", record.log_path)
            del self.blocked[container]
            return
        self.blocked[container] = why
        failure = LogBlocked(
            what=f"write the log of container {record.name[0]}",
            cause=f"write {record.log_path}: {why}; the container waits, no line is lost",
            remedy=f"free space for {os.path.dirname(record.log_path)}",
        )
        log.warning("%s", failure.sentence())
        self.record(self.store.sandboxes.get(record.sandbox), "failure", failure.what, encode(failure))
        self.tell("started", record)  # the nearest event that CRI has: look at it again

    async def note_lost(self, sandbox: str, failure: Failure) -> None:
        record = self.store.sandboxes.get(sandbox)
        if record is not None and record.ready:
            self.record(record, "failure", failure.what, encode(failure))
            await self.store.change(record, ready=False, failure=encode(failure))

    def _event(self, sandbox: str, event: dict[str, Any]) -> None:
        if event["event"] == "exited":
            background(self.note_exit(event["container"], event))
        elif event["event"] == "exec_exited":
            waiting = self._exec_ends.get((event["container"], event["exec_id"]))
            if waiting is not None and not waiting.done():
                waiting.set_result(event)
        elif event["event"] == "log_blocked":
            self.note_blocked(event["container"], event["why"])
        elif event["event"] == "sandbox_lost":
            background(self.note_lost(sandbox, decode(event["failure"])))

    def _closed(self, sandbox: str) -> None:
        """A shim hung up. Unless it was asked to, either it died, and its pod is ended with it, or we had been too slow for it."""
        record = self.store.sandboxes.get(sandbox)
        for container, exec_id in list(self._exec_ends):
            held = self.store.containers.get(container)
            if held is not None and held.sandbox == sandbox and not self._exec_ends[container, exec_id].done():
                what = f"wait for a command in container {held.name[0]}"
                self._exec_ends[container, exec_id].set_exception(ShimDied(what=what, cause="the pod's shim is gone"))
        if self.connections.get(sandbox) is not None and record is not None and record.ready:
            background(self._lost_shim(sandbox))

    async def _lost_shim(self, sandbox: str) -> None:
        async with self.lock(sandbox):
            record = self.store.sandboxes.get(sandbox)
            if record is not None and record.ready and self.connected(sandbox) is None:
                await self.take_up(record)

    async def shim_died(self, record: SandboxRecord) -> None:
        """Nothing of a pod outlives its shim: kill its cgroup, keep exit codes already written, 137 for the rest."""
        failure = self._shim_death(record)
        for container in self.store.containers_of(record.id):
            await asyncio.to_thread(cgroups.Cgroup(self.layout, self.cgroup_path(record, container.id)).kill)
        for container in self.store.containers_of(record.id):
            await self.note_exit(container.id, kept_exit(self.directory(record.id), container.id, failure))
        await self.note_lost(record.id, failure)
        await self.clear(record)

    async def clear(self, record: SandboxRecord) -> None:
        """What a pod whose shim is gone has left on the host: cgroups, mounts, its place in the network. Idempotent."""
        for container in {*(one.id for one in self.store.containers_of(record.id)), *_bundles(self.directory(record.id))}:
            await asyncio.to_thread(_end_without_shim, self.config, record.handler, container)
            await self._remove_group(self.cgroup_path(record, container))
        await self._remove_group(f"{self.cgroup_path(record)}/{record.id}")
        await self.remove_own_cgroup(record)
        unmount_below(self.directory(record.id))
        if record.attachment:
            await asyncio.to_thread(self.network.detach, record.id)

    async def remove_own_cgroup(self, record: SandboxRecord) -> None:
        """The pod's cgroup, where no caller named (and owns) one."""
        if not cri.PodSandboxConfig.FromString(record.config).linux.cgroup_parent:
            await self._remove_group(self.cgroup_path(record))

    async def _remove_group(self, path: str) -> None:
        group = cgroup_systemd.group(self.layout, path)
        if group.exists():
            await asyncio.to_thread(group.kill)
            await asyncio.to_thread(group.remove)

    def cgroup_path(self, record: SandboxRecord, container: str = "") -> str:
        """The pod's cgroup, or that of a container in it."""
        named = str(cri.PodSandboxConfig.FromString(record.config).linux.cgroup_parent)
        pod = named or cgroup_names.child(cgroup_names.child(self.config.cgroup_root, "pods"), record.id)
        return cgroup_names.container(pod, container) if container else pod

    @staticmethod
    def _shim_death(record: SandboxRecord) -> Failure:
        what = f"supervise pod {record.name[1]}/{record.name[0]}"
        return Failure(what=what, cause="its shim died", remedy="the pod is made anew")


def kept_exit(directory: str, container: str, failure: Failure) -> dict[str, Any]:
    """The exit that a shim wrote down before it died, else 137 with `failure` as ContainerStatusUnknown."""
    try:
        with open(f"{directory}/containers/{container}/exit.json", "rb") as file:
            document: dict[str, Any] = json.load(file)
            return document
    except (OSError, ValueError):
        unknown = encode(failure) | {"code": "ContainerStatusUnknown"}
        return {"code": 137, "at_ns": time.time_ns(), "oom_killed": False, "failure": unknown}


def busy_with(directory: str) -> tuple[str, ...]:
    """What a pod's shim and its children are doing, for a request that was not answered in time."""
    try:
        with open(f"{directory}/shim.json", "rb") as file:
            shim = int(json.load(file)["pid"])
        with open(f"/proc/{shim}/task/{shim}/children") as file:
            return tuple(_doing(pid) for pid in (shim, *map(int, file.read().split())))
    except (OSError, ValueError, KeyError) as error:
        return (f"its shim cannot be looked at: {error}",)


def _doing(pid: int) -> str:
    found = process.status(pid)
    try:
        with open(f"/proc/{pid}/wchan") as file:
            waits = file.read() or "0"
    except OSError:
        waits = "?"
    return f"pid {pid} is gone" if found is None else f"pid {pid} ({found[0]}) is in state {found[1]}, waits in {waits}"


def unmount_below(directory: str) -> None:
    """Whatever is mounted there off the host's mount table, deepest first, lazily."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4] for line in file]
    for point in sorted((point for point in points if point.startswith(directory + "/")), reverse=True):
        mounts.umount2(point, UnmountFlag.DETACH)


def remove_bundle(bundle: str) -> None:
    """The bundle's own files; its rootfs must be unmounted, so a directory that is not empty is an error, not a victim."""
    for name in _BUNDLE:
        try:
            os.unlink(f"{bundle}/{name}")
        except FileNotFoundError:
            pass
    for directory in (f"{bundle}/rootfs", bundle):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            pass


def runtime_root(config: Config, handler: str) -> str:
    """The state directory of a handler's runtime."""
    known = config.handlers.get(handler)
    return (known.root if known else "") or f"{config.state}/{handler}"


def _bundles(directory: str) -> list[str]:
    try:
        return os.listdir(f"{directory}/containers")
    except FileNotFoundError:
        return []


def _end_without_shim(config: Config, handler: str, container: str) -> None:
    """In a thread: a container's processes and its runtime's record of it, where no shim is left to ask."""
    root, known = runtime_root(config, handler), config.handlers.get(handler)
    if not os.path.isdir(f"{root}/{container}"):
        return
    if known is not None and known.binary:
        command = [known.binary, "--root", root, "delete", "--force", container]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            log.error("%s: %s", " ".join(command), done.stderr.strip())
    elif handler == "runc":
        runc.delete(root, container, force=True)


_tasks: set[asyncio.Task[None]] = set()


def background(work: Any) -> None:
    """A task of its own, kept until it ends; what it raises is logged with its traceback."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_finished)


def _finished(task: asyncio.Task[None]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("in the background: %s", task.exception(), exc_info=task.exception())
