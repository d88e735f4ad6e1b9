"""The Node object: made at start, its status kept true, its lease renewed.

The API server reaches the kubelet at the address and port told here. The lease is the heartbeat (every RENEW_S); the status is
written when it changes, and at least every STATUS_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from typing import Any

import grpc

from nacre import __version__
from nacre.config import Config
from nacre.kubelet.events import Events
from nacre.kubelet.resources import node_memory_bytes
from nacre.kubelet.times import micro, stamp
from nacre.oci.errors import Failure
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import Stub, failure_of
from nacre.wire.kube import ApiError, Kube

log = logging.getLogger("nacre.kubelet")
RENEW_S, LEASE_S, STATUS_S = 10.0, 40, 300.0
MAX_PODS = 110
LOW_MEMORY, LOW_DISK, LOW_PIDS = 100 * 1024 * 1024, 0.10, 0.05  # bytes left; shares left
KUBELET_VERSION = f"v1.37.0-nacre{__version__}"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """What the node has left."""

    memory_bytes: int
    disk_share: float
    pid_share: float


def measured(data: str) -> Pressure:
    """As the kernel tells now; `data` is a directory of the file system that images and logs are on."""
    found = os.statvfs(data)
    with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
        limit = int(file.read())
    with open("/proc/loadavg", encoding="ascii") as file:
        tasks = int(file.read().split()[3].partition("/")[2])
    return Pressure(
        memory_bytes=_meminfo("MemAvailable"), disk_share=found.f_bavail / max(1, found.f_blocks), pid_share=1 - tasks / limit
    )


def _meminfo(key: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def capacity(data: str) -> dict[str, str]:
    """What the node offers to pods."""
    disk = shutil.disk_usage(data)
    return {
        "cpu": str(len(os.sched_getaffinity(0))),
        "memory": f"{node_memory_bytes() // 1024}Ki",
        "ephemeral-storage": f"{disk.total // 1024}Ki",
        "pods": str(MAX_PODS),
    }


def conditions(ready: tuple[bool, str, str], left: Pressure, before: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """The four conditions; `ready` is (whether, reason, message). Transition times are kept where nothing changed."""
    low_memory, low_disk, low_pids = left.memory_bytes < LOW_MEMORY, left.disk_share < LOW_DISK, left.pid_share < LOW_PIDS
    rows = (
        (
            "MemoryPressure",
            low_memory,
            *_words(low_memory, "KubeletHasInsufficientMemory", "KubeletHasSufficientMemory", "memory available"),
        ),
        ("DiskPressure", low_disk, *_words(low_disk, "KubeletHasDiskPressure", "KubeletHasNoDiskPressure", "disk pressure")),
        ("PIDPressure", low_pids, *_words(low_pids, "KubeletHasInsufficientPID", "KubeletHasSufficientPID", "PID available")),
        ("Ready", *ready),
    )
    known = {one["type"]: one for one in before}
    made = []
    for kind, true, reason, message in rows:
        word = "True" if true else "False"
        old = known.get(kind)
        since = old["lastTransitionTime"] if old is not None and old.get("status") == word else stamp(now)
        made.append(
            {"type": kind, "status": word, "reason": reason, "message": message,
             "lastHeartbeatTime": stamp(now), "lastTransitionTime": since}
        )  # fmt: skip
    return made


def _words(low: bool, bad: str, good: str, what: str) -> tuple[str, str]:
    if what == "disk pressure":
        return (bad if low else good), f"kubelet has {'' if low else 'no '}{what}"
    return (bad if low else good), f"kubelet has {'in' if low else ''}sufficient {what}"


class Node:
    """This machine's Node object and lease."""

    def __init__(self, config: Config, kube: Kube, runtime: Stub, events: Events, address: str) -> None:
        self._config, self._kube, self._runtime, self._events, self._address = config, kube, runtime, events, address
        self._path = f"/api/v1/nodes/{config.node_name}"
        self._status: dict[str, Any] = {}
        self._written_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the API server has the node, Ready or with the reason why not. Raises Failure, ApiError."""
        await self._register()
        await self._renew()
        self._events.node("Starting", "Starting kubelet.")
        self._task = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """The node stays, NotReady in words of our own: nobody has to wait for a lease to run out."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(ApiError, Failure):
            await self._tell((False, "KubeletStopped", "kubelet was stopped by nacre down"))

    async def _register(self) -> None:
        name = self._config.node_name
        wanted = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        }
        try:
            known = await self._kube.get(self._path)
            if any(known["metadata"].get("labels", {}).get(key) != value for key, value in wanted.items()):
                known = await self._kube.patch(self._path, {"metadata": {"labels": wanted}}, "merge")
        except ApiError as error:
            if error.code != 404:
                raise
            body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": wanted}, "spec": {}}
            known = await self._kube.create("/api/v1/nodes", body)
        self._status = known.get("status") or {}
        await self._tell(await self._readiness())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._renew()
                await self._tell(await self._readiness())
            except (ApiError, Failure) as error:
                log.warning("node %s: %s", self._config.node_name, error)

    async def _readiness(self) -> tuple[bool, str, str]:
        """Whether the runtime takes pods: its own words if not."""
        try:
            answer = await self._runtime.Status(cri.StatusRequest(), timeout=RENEW_S)
        except grpc.RpcError as error:
            return False, "KubeletNotReady", f"container runtime is down: {failure_of(error, 'ask the runtime').cause}"
        broken = [one for one in answer.status.conditions if not one.status]
        if broken:
            words = "; ".join(f"{one.type}: {one.message or one.reason}" for one in broken)
            return False, "KubeletNotReady", f"container runtime not ready: {words}"
        return True, "KubeletReady", "kubelet is posting ready status"

    async def _tell(self, ready: tuple[bool, str, str]) -> None:
        """Write the status if it changed, or is old."""
        now = time.time()
        left = measured(self._config.data)
        fresh = conditions(ready, left, self._status.get("conditions") or [], now)
        self._note_changes(fresh)
        if _essence(fresh) == _essence(self._status.get("conditions") or []) and now - self._written_at < STATUS_S:
            return
        status = {"conditions": fresh} | await self._facts()
        answer = await self._kube.patch(f"{self._path}/status", {"status": status}, "merge")
        self._status, self._written_at = answer.get("status") or status, now

    def _note_changes(self, fresh: list[dict[str, Any]]) -> None:
        before = {one["type"]: one["status"] for one in self._status.get("conditions") or []}
        for one in fresh:
            if before.get(one["type"]) == one["status"]:
                continue
            name = self._config.node_name
            word = {"Ready": "NodeReady" if one["status"] == "True" else "NodeNotReady"}.get(one["type"])
            word = word or one["reason"].replace("Kubelet", "Node", 1)
            self._events.node(word, f"Node {name} status is now: {word}")

    async def _facts(self) -> dict[str, Any]:
        """The status but for its conditions."""
        room = capacity(self._config.data)
        version = await self._runtime.Version(cri.VersionRequest())
        uname = os.uname()
        return {
            "capacity": room,
            "allocatable": room,
            "addresses": [
                {"type": "InternalIP", "address": self._address},
                {"type": "Hostname", "address": self._config.node_name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._config.kubelet_port}},
            "nodeInfo": {
                "machineID": _first_line("/etc/machine-id"),
                "systemUUID": _first_line("/sys/class/dmi/id/product_uuid"),
                "bootID": _first_line("/proc/sys/kernel/random/boot_id"),
                "kernelVersion": uname.release,
                "osImage": _os_name(),
                "containerRuntimeVersion": f"{version.runtime_name}://{version.runtime_version}",
                "kubeletVersion": KUBELET_VERSION,
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(uname.machine, uname.machine),
            },
        }

    async def _renew(self) -> None:
        name = self._config.node_name
        spec = {"holderIdentity": name, "leaseDurationSeconds": LEASE_S, "renewTime": micro(time.time())}
        try:
            await self._kube.patch(f"{LEASES}/{name}", {"spec": spec}, "merge")
        except ApiError as error:
            if error.code != 404:
                raise
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": spec}
            await self._kube.create(LEASES, body)


def _essence(listed: list[dict[str, Any]]) -> set[tuple[str, ...]]:
    return {(one["type"], one["status"], one.get("reason", ""), one.get("message", "")) for one in listed}


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.readline().strip()
    except OSError:
        return ""


def _os_name() -> str:
    try:
        with open("/etc/os-release", encoding="utf-8") as file:
            pairs = dict(line.rstrip().split("=", 1) for line in file if "=" in line)
    except OSError:
        return ""
    return pairs.get("PRETTY_NAME", "").strip('"')
