"""What a worker holds and knows of its one pod; `making`, `ending` and `worker` act on it.

The runtime's words come in through `note` alone: the newest attempt of each container counts, the one before it becomes lastState.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import grpc

from nacre.kubelet import logs, probes, status, translate
from nacre.kubelet.host import Host
from nacre.kubelet.plan import Seen, View, next_backoff
from nacre.kubelet.resources import PodCgroup, qos_class
from nacre.kubelet.times import parse
from nacre.kubelet.volumes import PodVolumes
from nacre.oci import trace
from nacre.oci.errors import Failure, encode
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import failure_of

TERMINATION_BYTES = 4096
_STATES = {
    cri.CONTAINER_CREATED: "created",
    cri.CONTAINER_RUNNING: "running",
    cri.CONTAINER_EXITED: "exited",
    cri.CONTAINER_UNKNOWN: "exited",
}


class Life:
    """One pod on this node. `pod` is the newest object, from the API server or a static manifest."""

    def __init__(self, host: Host, pod: dict[str, Any]) -> None:
        self.host, self.pod = host, pod
        self.uid = str(pod["metadata"]["uid"])
        self.facts = status.Facts(node_address=host.address, start_time=_start_time(pod))
        self.volumes = PodVolumes(host.config.kubelet_dir, self.uid)
        self.cgroup = PodCgroup(host.layout, host.config.cgroup_root, self.uid, qos_class(pod["spec"]))
        self.frame = translate.Frame(
            config=host.config, volumes=self.volumes, cgroup_parent=self.cgroup.path, node_memory=host.memory_bytes
        )
        self.sandbox, self.sandbox_ready, self.sandbox_attempt = "", False, -1
        self.sandboxes: dict[str, str] = {}  # container id → sandbox id
        self.not_before: dict[str, float] = {}  # container, or plan.SANDBOX → Unix time
        self.backoff_s: dict[str, float] = {}
        self.probers: dict[str, probes.Prober] = {}  # container id → its probes
        self.unhealthy: set[str] = set()  # containers whose liveness or startup probe failed
        self.cgroup_made = False
        self.hurry = asyncio.Event()  # the pod is to end, or to end sooner

    # the pod

    @property
    def title(self) -> str:
        return f"{self.pod['metadata']['namespace']}/{self.pod['metadata']['name']}"

    @property
    def address(self) -> str:
        return self.host.address if self.pod["spec"].get("hostNetwork") else (self.facts.addresses or ["127.0.0.1"])[0]

    def containers(self) -> list[dict[str, Any]]:
        return [*(self.pod["spec"].get("initContainers") or []), *self.pod["spec"]["containers"]]

    def container(self, name: str) -> dict[str, Any]:
        return next(one for one in self.containers() if one["name"] == name)

    def with_addresses(self) -> dict[str, Any]:
        """The pod as its containers' environment is to see it: the API server may not know its address yet."""
        addresses = {"podIP": self.address, "podIPs": [{"ip": self.address}]}
        return self.pod | {"status": (self.pod.get("status") or {}) | addresses}

    # the runtime

    async def call(self, method: Any, request: Any, what: str) -> Any:
        """One RPC; a gRPC error becomes the Failure that it carries."""
        try:
            return await method(request)
        except grpc.RpcError as error:
            raise failure_of(error, f"{what} of pod {self.title}") from error

    async def ask_runtime(self) -> None:
        """What the runtime has of this pod: after a start of the kubelet, or after anything went wrong."""
        runtime = self.host.runtime
        wanted = cri.PodSandboxFilter(label_selector={translate.UID_LABEL: self.uid})
        listed = await self.call(runtime.ListPodSandbox, cri.ListPodSandboxRequest(filter=wanted), "list the sandboxes")
        self.sandbox, self.sandbox_ready = "", False
        for item in sorted(listed.items, key=lambda one: one.metadata.attempt):
            request = cri.PodSandboxStatusRequest(pod_sandbox_id=item.id)
            answer = await self.call(runtime.PodSandboxStatus, request, "ask for the sandbox")
            self.note_sandbox(answer.status)
            containers = list(answer.containers_statuses) or await self._statuses(item.id)
            for one in sorted(containers, key=lambda found: int(found.metadata.attempt)):
                self.note(one, item.id)

    async def _statuses(self, sandbox: str) -> list[Any]:
        """For runtimes whose PodSandboxStatus does not tell of containers."""
        runtime, wanted = self.host.runtime, cri.ContainerFilter(pod_sandbox_id=sandbox)
        listed = await self.call(runtime.ListContainers, cri.ListContainersRequest(filter=wanted), "list the containers")
        requests = [cri.ContainerStatusRequest(container_id=one.id) for one in listed.containers]
        return [(await self.call(runtime.ContainerStatus, one, "ask for the container")).status for one in requests]

    async def refresh(self, identifier: str) -> None:
        request = cri.ContainerStatusRequest(container_id=identifier)
        answer = await self.call(self.host.runtime.ContainerStatus, request, "ask for the container")
        self.note(answer.status, self.sandboxes.get(identifier, self.sandbox))

    def note_sandbox(self, told: Any) -> None:
        if told.metadata.attempt < self.sandbox_attempt:
            return  # a former one
        self.sandbox, self.sandbox_attempt = told.id, told.metadata.attempt
        self.sandbox_ready = self.facts.sandbox_made = told.state == cri.SANDBOX_READY
        network = told.network
        if network.ip:
            self.facts.addresses = [network.ip, *(one.ip for one in network.additional_ips)]

    def note(self, one: Any, sandbox: str) -> None:
        """A container's status, from an answer or an event; older attempts than the known one are no news."""
        name = one.metadata.name
        if name not in {container["name"] for container in self.containers()}:
            return
        before = self.facts.statuses.get(name)
        if before is not None and before.metadata.attempt > one.metadata.attempt:
            return
        if before is not None and before.id == one.id and before.state == cri.CONTAINER_EXITED:
            return  # an event that was overtaken by an answer
        if before is not None and before.id != one.id:
            self.facts.former[name] = status.state_of(before, self.facts.messages.get(before.id, ""))
        self.sandboxes[one.id] = sandbox
        self.facts.statuses[name] = one
        if one.state == cri.CONTAINER_EXITED:
            self._note_end(name, one)
        if one.state == cri.CONTAINER_RUNNING and self.facts.waiting.get(name):
            del self.facts.waiting[name]

    def _note_end(self, name: str, one: Any) -> None:
        self.facts.messages[one.id] = self._termination_message(name, one)
        ran_s = (one.finished_at - one.started_at) / 1e9
        self.back_off(name, one.finished_at / 1e9, ran_s, first=not one.metadata.attempt)
        for table in (self.facts.ready, self.facts.started):
            table.pop(name, None)
        prober = self.probers.pop(one.id, None)
        if prober is not None:
            self.host.background(prober.stop())

    def back_off(self, name: str, ended: float, ran_s: float, *, first: bool) -> None:
        self.backoff_s[name] = 0.0 if first else next_backoff(self.backoff_s.get(name, 0.0), ran_s)
        self.not_before[name] = ended + self.backoff_s[name]

    def _termination_message(self, name: str, one: Any) -> str:
        path = translate.termination_file(self.volumes, name, one.metadata.attempt)
        try:
            with open(path, "rb") as file:
                text = file.read(TERMINATION_BYTES).decode(errors="replace")
        except OSError:
            text = ""
        if not text and one.exit_code and self.container(name).get("terminationMessagePolicy") == "FallbackToLogsOnError":
            return logs.last_words(one.log_path)
        return text

    def view(self) -> View:
        """What `plan` decides by."""
        return View(sandbox_ready=self.sandbox_ready, containers=dict(self._seen()))

    def _seen(self) -> Iterator[tuple[str, Seen]]:
        for name, one in self.facts.statuses.items():
            yield (
                name,
                Seen(
                    state=_STATES[one.state],
                    exit_code=one.exit_code,
                    image=one.image.user_specified_image,
                    current=self.sandboxes.get(one.id) == self.sandbox,
                    started_ok=self.facts.started.get(name, True),
                ),
            )

    def next_attempt(self, name: str) -> int:
        """Numbers go on after the runtime has forgotten the pod: log files of before stay readable."""
        one = self.facts.statuses.get(name)
        if one is not None:
            return int(one.metadata.attempt) + 1
        told = self.pod.get("status") or {}
        listed = [*(told.get("initContainerStatuses") or []), *(told.get("containerStatuses") or [])]
        return next((int(known["restartCount"]) + 1 for known in listed if known["name"] == name and known.get("containerID")), 0)

    def running(self) -> list[tuple[str, Any]]:
        return [(name, one) for name, one in self.facts.statuses.items() if one.state == cri.CONTAINER_RUNNING]

    async def end_probes(self) -> None:
        probers, self.probers = list(self.probers.values()), {}
        await asyncio.gather(*(prober.stop() for prober in probers))

    # telling

    def event(self, reason: str, message: str, *, container: str = "", warning: bool = False) -> None:
        self.host.events.pod(self.pod, reason, message, container=container, warning=warning)

    def record_failure(self, failure: Failure) -> None:
        """For `nacre explain`, which shows the first one."""
        trace.record(self.host.config.trace_dir, self.uid, "failure", failure.what, encode(failure))


def _start_time(pod: dict[str, Any]) -> float:
    known = (pod.get("status") or {}).get("startTime")
    return parse(known) if known else time.time()
