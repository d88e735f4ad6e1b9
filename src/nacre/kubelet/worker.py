"""One pod's life on this node: a task that wakes for each change, asks `plan` what comes next, and does it.

A worker touches its own pod alone: a runtime call that hangs holds up nobody else. What it learns becomes `.status` at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc

from nacre.kubelet import probes, status, translate
from nacre.kubelet.expand import ConfigError, Sources
from nacre.kubelet.node import Host
from nacre.kubelet.plan import Action, Seen, View, next_backoff, plan
from nacre.kubelet.pulling import ImageTrouble
from nacre.kubelet.resources import PodCgroup, pod_totals, qos_class
from nacre.kubelet.volumes import PodVolumes
from nacre.oci import trace
from nacre.oci.errors import Failure, encode
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import failure_of
from nacre.wire.kube import ApiError

log = logging.getLogger("nacre.kubelet")
RETRY_S = 5.0  # after a failure that nothing announces the end of
TERMINATION_BYTES = 4096
_STATES = {
    cri.CONTAINER_CREATED: "created",
    cri.CONTAINER_RUNNING: "running",
    cri.CONTAINER_EXITED: "exited",
    cri.CONTAINER_UNKNOWN: "exited",
}


@dataclass(slots=True)
class Memory:
    """What a worker keeps between wakes."""

    sandbox: str = ""
    sandbox_ready: bool = False
    sandbox_attempt: int = -1
    backoff: dict[str, float] = field(default_factory=dict)
    probers: dict[str, probes.Prober] = field(default_factory=dict)  # container id → its probes
    restart: set[str] = field(default_factory=set)  # containers whose liveness failed
    cgroup_made: bool = False


class Worker:
    """The life of `pod` on this node; `host` is what all workers share."""

    def __init__(self, host: Host, pod: dict[str, Any]) -> None:
        self._host, self.pod = host, pod
        self.uid = str(pod["metadata"]["uid"])
        self._memory = Memory()
        self._facts = status.Facts(node_address=host.address, start_time=_start_time(pod))
        self._volumes = PodVolumes(host.config.kubelet_dir, self.uid)
        self._cgroup = PodCgroup(host.layout, host.config.cgroup_root, self.uid, qos_class(pod["spec"]))
        self._frame = translate.Frame(
            config=host.config, volumes=self._volumes, cgroup_parent=self._cgroup.path, node_memory=host.memory_bytes
        )
        self._wake = asyncio.Event()
        self._known = False  # whether the runtime was asked what it has of this pod
        self._written: dict[str, Any] | None = None
        self._api_recorded = ""
        self.task = asyncio.create_task(self._run())

    def update(self, pod: dict[str, Any]) -> None:
        """The API server has a newer version of the pod."""
        self.pod = pod
        self._wake.set()

    def runtime_event(self, event: Any) -> None:
        """The runtime's word about one of this pod's containers or its sandbox."""
        if event.HasField("pod_sandbox_status") and event.pod_sandbox_status.id == self._memory.sandbox:
            self._memory.sandbox_ready = event.pod_sandbox_status.state == cri.SANDBOX_READY
        for one in event.containers_statuses:
            self._note(one)
        self._wake.set()

    async def stop(self) -> None:
        """The kubelet ends; the pod does not."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self._end_probes()

    # the loop

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            wait_s: float | None = None
            try:
                if not self._known:
                    await self._ask_runtime()
                wait_s = await self._step()
                if wait_s is not None and wait_s < 0:
                    return
            except ApiError as error:
                if error.code == 404:
                    log.info("pod %s is gone from the API", self._title)
                log.warning("pod %s: the API said %s", self._title, error)
                wait_s = RETRY_S
            except (Failure, grpc.RpcError, OSError) as error:
                log.warning("pod %s: %s", self._title, failure_text(error))
                self._known = False
                wait_s = RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    async def _step(self) -> float | None:
        """One decision carried out; answers when to look again (None: when something happens, -1: never)."""
        self._record_pod()
        action = plan(self.pod, self._view(), self._memory.backoff, time.time())
        if action.stop_all:
            return await self._end(action.stop_all)
        if action.finished:
            await self._finish()
            return None
        await self._restart_unhealthy()
        wait_s = await self._proceed(action)
        await self._write_status()
        return wait_s

    async def _proceed(self, action: Action) -> float | None:
        self._note_backoff(action)
        if not action.make_sandbox and not action.start:
            return action.wake_s
        try:
            sources = await self._host.sources(self.pod)
            await self._prepare(sources)
            if action.make_sandbox:
                await self._make_sandbox()
                self._wake.set()
                return None
            for name in action.start:
                await self._start(name, sources)
            return action.wake_s
        except ImageTrouble as trouble:
            return (
                self._host.puller.wait_left(self.uid, self._image_in_trouble) or RETRY_S
                if trouble.word != "ErrImageNeverPull"
                else RETRY_S
            )
        except ConfigError as failure:
            self._blame_all(failure, "CreateContainerConfigError", "Failed", f"Error: {failure.sentence()}")
        except Failure as failure:
            reason = "FailedMount" if failure.code == "FailedMount" else "FailedCreatePodSandBox"
            words = (
                f"Failed to create pod sandbox: {failure.sentence()}"
                if reason == "FailedCreatePodSandBox"
                else failure.sentence()
            )
            self._facts.sandbox_failure = failure.sentence()
            self._blame(failure, reason, words)
        return RETRY_S

    # making

    async def _prepare(self, sources: Sources) -> None:
        """What must be there before the sandbox: cgroup, volumes."""
        if not self._memory.cgroup_made:
            await asyncio.to_thread(self._cgroup.make, pod_totals(self.pod["spec"]))
            self._memory.cgroup_made = True
        if self.pod["spec"].get("volumes"):
            await asyncio.to_thread(self._volumes.prepare, self.pod, sources)
        else:
            os.makedirs(self._volumes.directory, exist_ok=True)

    async def _make_sandbox(self) -> None:
        memory = self._memory
        if memory.sandbox:
            self._host.events.pod(self.pod, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
            await self._call(
                self._host.runtime.StopPodSandbox,
                cri.StopPodSandboxRequest(pod_sandbox_id=memory.sandbox),
                "stop the former sandbox",
            )
        memory.sandbox_attempt += 1
        handler = await self._host.handler_of(self.pod)
        config = translate.sandbox_config(self.pod, memory.sandbox_attempt, self._frame)
        request = cri.RunPodSandboxRequest(config=config, runtime_handler=handler)
        try:
            memory.sandbox = (
                await self._call(self._host.runtime.RunPodSandbox, request, "create the pod sandbox")
            ).pod_sandbox_id
        except Failure:
            memory.sandbox_attempt -= 1
            raise
        memory.sandbox_ready = True
        self._facts.sandbox_made, self._facts.sandbox_failure = True, ""
        answer = await self._call(
            self._host.runtime.PodSandboxStatus, cri.PodSandboxStatusRequest(pod_sandbox_id=memory.sandbox), "ask for the sandbox"
        )
        network = answer.status.network
        self._facts.addresses = [network.ip, *(one.ip for one in network.additional_ips)] if network.ip else []
        self._write_hosts()

    def _write_hosts(self) -> None:
        if self.pod["spec"].get("hostNetwork"):
            return
        lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
        lines += [f"{address}\t{self.pod['metadata']['name']}" for address in self._facts.addresses]
        lines += [
            f"{alias['ip']}\t{' '.join(alias.get('hostnames') or [])}" for alias in self.pod["spec"].get("hostAliases") or []
        ]
        with open(f"{self._volumes.directory}/etc-hosts", "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    async def _start(self, name: str, sources: Sources) -> None:
        """One container from image to running, each failure told in its own word."""
        container = self._container(name)
        try:
            image = await self._image(container)
            translate.check_non_root(self.pod, container, (await self._image_status(image)).image)
            attempt = self._next_attempt(name)
            config = translate.container_config(self._with_addresses(), container, attempt, image, sources, self._frame)
        except (ImageTrouble, ConfigError) as failure:
            word = failure.word if isinstance(failure, ImageTrouble) else "CreateContainerConfigError"
            self._facts.waiting[name] = (word, failure.sentence())
            self._record_failure(failure)
            if word == "CreateContainerConfigError":
                self._host.events.pod(self.pod, "Failed", f"Error: {failure.sentence()}", container=name, warning=True)
                raise Failure(what=failure.what, cause=failure.cause, remedy=failure.remedy) from failure
            self._image_in_trouble = container["image"]
            await self._write_status()
            raise
        identifier = await self._create(name, config)
        await self._begin(name, container, identifier)

    async def _create(self, name: str, config: Any) -> str:
        sandbox = translate.sandbox_config(self.pod, self._memory.sandbox_attempt, self._frame)
        request = cri.CreateContainerRequest(pod_sandbox_id=self._memory.sandbox, config=config, sandbox_config=sandbox)
        try:
            answer = await self._call(self._host.runtime.CreateContainer, request, f"create container {name}")
        except Failure as failure:
            await self._container_failed(name, failure, "CreateContainerError")
            raise
        self._host.events.pod(self.pod, "Created", f"Created container: {name}", container=name)
        return str(answer.container_id)

    async def _begin(self, name: str, container: dict[str, Any], identifier: str) -> None:
        try:
            await self._call(
                self._host.runtime.StartContainer, cri.StartContainerRequest(container_id=identifier), f"start container {name}"
            )
        except Failure as failure:
            await self._note_status(identifier)
            await self._container_failed(name, failure, "RunContainerError")
            return
        self._facts.waiting.pop(name, None)
        self._host.events.pod(self.pod, "Started", f"Started container {name}", container=name)
        await self._note_status(identifier)
        hook = (container.get("lifecycle") or {}).get("postStart")
        if hook and not await self._hook(hook, container, identifier, "FailedPostStartHook"):
            await self._stop_container(name, identifier, "FailedPostStartHook")
            return
        self._facts.started[name] = "startupProbe" not in container
        if "readinessProbe" in container:
            self._facts.ready[name] = False
        if identifier not in self._memory.probers:
            self._memory.probers[identifier] = self._prober(name, container, identifier)

    async def _container_failed(self, name: str, failure: Failure, word: str) -> None:
        self._facts.waiting[name] = (word, failure.sentence())
        self._memory.backoff[name] = next_backoff(self._memory.backoff.get(name, 0.0), 0.0)
        self._record_failure(failure)
        self._host.events.pod(self.pod, "Failed", f"Error: {failure.sentence()}", container=name, warning=True)
        await self._write_status()

    async def _image(self, container: dict[str, Any]) -> str:
        secrets = await self._host.pull_secrets(self.pod)
        return await self._host.puller.ensure(self.pod, container, await self._host.handler_of(self.pod), secrets)

    async def _image_status(self, image: str) -> Any:
        return await self._host.images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=image)))

    _image_in_trouble = ""

    # ending

    async def _end(self, why: str) -> float:
        """The whole pod down; for a deleted pod the object too. Answers -1 when nothing is left to do."""
        grace = 0 if why != "deleted" else int(self.pod["metadata"].get("deletionGracePeriodSeconds") or 0)
        if why != "deleted":
            self._facts.ended = (why, "Pod was active on the node longer than the specified deadline")
        await self._end_probes()
        running = [(name, one) for name, one in self._facts.statuses.items() if one.state == cri.CONTAINER_RUNNING]
        await asyncio.gather(*(self._stop_container(name, one.id, "Killing", grace) for name, one in running))
        await self._take_away()
        if why != "deleted":
            await self._write_status()
            return 3600.0
        await self._write_status()
        await asyncio.to_thread(self._volumes.teardown)
        if self._memory.cgroup_made or True:
            await asyncio.to_thread(self._cgroup.remove)
        await self._delete_object()
        self._host.puller.forget(self.uid)
        trace.forget(self._host.config.trace_dir, self.uid)
        return -1.0

    async def _take_away(self) -> None:
        """Every sandbox of the pod, with its containers, off the runtime."""
        wanted = cri.PodSandboxFilter(label_selector={"io.kubernetes.pod.uid": self.uid})
        listed = await self._call(
            self._host.runtime.ListPodSandbox, cri.ListPodSandboxRequest(filter=wanted), "list the pod's sandboxes"
        )
        for item in listed.items:
            await self._call(
                self._host.runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id=item.id), "stop the pod sandbox"
            )
            await self._read_ends()
            await self._call(
                self._host.runtime.RemovePodSandbox, cri.RemovePodSandboxRequest(pod_sandbox_id=item.id), "remove the pod sandbox"
            )
        self._memory.sandbox, self._memory.sandbox_ready = "", False
        self._facts.sandbox_made = False

    async def _read_ends(self) -> None:
        for one in list(self._facts.statuses.values()):
            if one.state != cri.CONTAINER_EXITED:
                await self._note_status(one.id)

    async def _finish(self) -> None:
        """Nothing runs any more: final status, then the sandbox stops; its containers stay for their logs."""
        await self._end_probes()
        await self._write_status()
        if self._memory.sandbox_ready:
            self._memory.sandbox_ready = False
            await self._call(
                self._host.runtime.StopPodSandbox,
                cri.StopPodSandboxRequest(pod_sandbox_id=self._memory.sandbox),
                "stop the pod sandbox",
            )
        self._facts.sandbox_made = False
        await self._write_status()

    async def _stop_container(self, name: str, identifier: str, why: str, grace: int | None = None) -> None:
        container = self._container(name)
        seconds = int(self.pod["spec"].get("terminationGracePeriodSeconds", 30)) if grace is None else grace
        self._host.events.pod(self.pod, "Killing", f"Stopping container {name}", container=name)
        hook = (container.get("lifecycle") or {}).get("preStop")
        if hook and seconds > 0:
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._hook(hook, container, identifier, "FailedPreStopHook")
            seconds = max(2, int(seconds - (time.monotonic() - began)))
        await self._call(
            self._host.runtime.StopContainer,
            cri.StopContainerRequest(container_id=identifier, timeout=seconds),
            f"stop container {name} ({why})",
        )
        await self._note_status(identifier)

    async def _restart_unhealthy(self) -> None:
        for name in list(self._memory.restart):
            self._memory.restart.discard(name)
            one = self._facts.statuses.get(name)
            if one is not None and one.state == cri.CONTAINER_RUNNING:
                self._host.events.pod(
                    self.pod, "Killing", f"Container {name} failed liveness probe, will be restarted", container=name
                )
                await self._stop_container(name, one.id, "liveness")

    async def _delete_object(self) -> None:
        metadata = self.pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        try:
            await self._host.kube.delete(path, {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}})
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    # knowing

    def _view(self) -> View:
        containers = {
            name: Seen(
                id=one.id,
                attempt=one.metadata.attempt,
                state=_STATES[one.state],
                exit_code=one.exit_code,
                finished_at=one.finished_at / 1e9,
            )
            for name, one in self._facts.statuses.items()
        }
        return View(sandbox=self._memory.sandbox, sandbox_ready=self._memory.sandbox_ready, containers=containers)

    async def _ask_runtime(self) -> None:
        """What the runtime has of this pod: after a start of the kubelet, or after anything went wrong."""
        wanted = cri.PodSandboxFilter(label_selector={"io.kubernetes.pod.uid": self.uid})
        listed = await self._call(
            self._host.runtime.ListPodSandbox, cri.ListPodSandboxRequest(filter=wanted), "list the pod's sandboxes"
        )
        for item in sorted(listed.items, key=lambda one: one.metadata.attempt):
            answer = await self._call(
                self._host.runtime.PodSandboxStatus, cri.PodSandboxStatusRequest(pod_sandbox_id=item.id), "ask for the sandbox"
            )
            memory = self._memory
            memory.sandbox, memory.sandbox_attempt = item.id, item.metadata.attempt
            memory.sandbox_ready = answer.status.state == cri.SANDBOX_READY
            self._facts.sandbox_made = memory.sandbox_ready
            ip = answer.status.network.ip
            self._facts.addresses = [ip] if ip else []
            for one in sorted(answer.containers_statuses, key=lambda found: found.metadata.attempt):
                self._note(one)
                if one.state == cri.CONTAINER_RUNNING and one.id not in memory.probers:
                    name = one.metadata.name
                    memory.probers[one.id] = self._prober(name, self._container(name), one.id)
        self._known = True

    def _note(self, one: Any) -> None:
        """The newest attempt counts; the one before becomes lastState."""
        name = one.metadata.name
        if name not in {spec["name"] for spec in self._all_containers()}:
            return
        before = self._facts.statuses.get(name)
        if before is not None and before.metadata.attempt > one.metadata.attempt:
            return
        if before is not None and before.id != one.id:
            self._facts.former[name] = status.state_of(before, self._facts.messages.get(before.id, ""))
        ended = one.state == cri.CONTAINER_EXITED
        if ended and (before is None or before.id != one.id or before.state != cri.CONTAINER_EXITED):
            self._note_end(name, one)
        self._facts.statuses[name] = one

    def _note_end(self, name: str, one: Any) -> None:
        self._facts.messages[one.id] = self._termination_message(name, one)
        ran = (one.finished_at - one.started_at) / 1e9
        self._memory.backoff[name] = next_backoff(self._memory.backoff.get(name, 0.0), ran) if one.metadata.attempt else 0.0
        self._facts.ready.pop(name, None)
        prober = self._memory.probers.pop(one.id, None)
        if prober is not None:
            self._host.background(prober.stop())

    def _termination_message(self, name: str, one: Any) -> str:
        path = translate.termination_file(self._volumes, name, one.metadata.attempt)
        try:
            with open(path, "rb") as file:
                text = file.read(TERMINATION_BYTES).decode(errors="replace")
        except OSError:
            text = ""
        fallback = self._container(name).get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not text and fallback and one.exit_code:
            from nacre.kubelet.logs import last_words

            return last_words(one.log_path)
        return text

    async def _note_status(self, identifier: str) -> None:
        answer = await self._call(
            self._host.runtime.ContainerStatus, cri.ContainerStatusRequest(container_id=identifier), "ask for the container"
        )
        self._note(answer.status)

    def _note_backoff(self, action: Action) -> None:
        for name, left in action.waiting.items():
            metadata = self.pod["metadata"]
            title = f"{metadata['name']}_{metadata['namespace']}({self.uid})"
            seconds = int(self._memory.backoff.get(name, 0))
            if self._facts.waiting.get(name, ("",))[0] != "CrashLoopBackOff" and left > 0:
                self._host.events.pod(
                    self.pod,
                    "BackOff",
                    f"Back-off restarting failed container {name} in pod {title}",
                    container=name,
                    warning=True,
                )
                if self._facts.waiting.get(name, ("",))[0] not in ("RunContainerError", "CreateContainerError"):
                    message = f"back-off {seconds}s restarting failed container={name} pod={title}"
                    self._facts.waiting[name] = ("CrashLoopBackOff", message)

    def _next_attempt(self, name: str) -> int:
        one = self._facts.statuses.get(name)
        return 0 if one is None else int(one.metadata.attempt) + 1

    # telling

    async def _write_status(self) -> None:
        made = status.pod_status(self.pod, self._facts, time.time())
        current = self.pod.get("status") or {}
        if made == self._written or made == {key: current.get(key) for key in made}:
            return
        metadata = self.pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        try:
            answer = await self._host.kube.patch(path, {"metadata": {"uid": metadata["uid"]}, "status": made}, "merge")
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            return
        self._written = made
        self.pod = self.pod | {"status": answer.get("status") or made}

    def _blame_all(self, failure: Failure, word: str, reason: str, words: str) -> None:
        for container in self._all_containers():
            if container["name"] not in self._facts.statuses:
                self._facts.waiting[container["name"]] = (word, failure.sentence())
        self._blame(failure, reason, words)

    def _blame(self, failure: Failure, reason: str, words: str) -> None:
        self._record_failure(failure)
        self._host.events.pod(self.pod, reason, words, warning=True)

    def _record_failure(self, failure: Failure) -> None:
        trace.record(self._host.config.trace_dir, self.uid, "failure", failure.what, encode(failure))

    def _record_pod(self) -> None:
        version = str(self.pod["metadata"].get("generation") or self.pod["metadata"].get("creationTimestamp"))
        if version != self._api_recorded:
            self._api_recorded = version
            document = {key: value for key, value in self.pod.items() if key != "status"}
            trace.record(self._host.config.trace_dir, self.uid, "api", "Pod", document)

    # probes and hooks

    def _prober(self, name: str, container: dict[str, Any], identifier: str) -> probes.Prober:
        def result(kind: str, passed: bool, words: str) -> None:
            if kind == "readinessProbe":
                self._facts.ready[name] = passed
            elif kind == "startupProbe" and passed:
                self._facts.started[name] = True
            elif not passed:
                self._memory.restart.add(name)
            self._wake.set()

        def failed(kind: str, _passed: bool, words: str) -> None:
            self._host.events.pod(
                self.pod, "Unhealthy", f"{probes.KINDS[kind]} probe failed: {words}", container=name, warning=True
            )

        return probes.Prober(self._host.runtime, container, identifier, self._address, result, failed)

    async def _hook(self, hook: dict[str, Any], container: dict[str, Any], identifier: str, reason: str) -> bool:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
            try:
                passed, words = await probes.attempt(
                    self._host.runtime, hook, container, identifier, self._address, 60.0, lambda: session
                )
            except (Failure, aiohttp.ClientError, OSError) as error:
                passed, words = False, failure_text(error)
        if not passed:
            self._host.events.pod(
                self.pod, reason, f"{reason.removeprefix('Failed')} failed: {words}", container=container["name"], warning=True
            )
        return passed

    async def _end_probes(self) -> None:
        probers, self._memory.probers = list(self._memory.probers.values()), {}
        await asyncio.gather(*(prober.stop() for prober in probers))

    # small things

    @property
    def _title(self) -> str:
        return f"{self.pod['metadata']['namespace']}/{self.pod['metadata']['name']}"

    @property
    def _address(self) -> str:
        return self._host.address if self.pod["spec"].get("hostNetwork") else (self._facts.addresses or ["127.0.0.1"])[0]

    def _with_addresses(self) -> dict[str, Any]:
        addresses = {"podIP": self._address, "podIPs": [{"ip": self._address}]}
        return self.pod | {"status": (self.pod.get("status") or {}) | addresses}

    def _all_containers(self) -> list[dict[str, Any]]:
        return [*(self.pod["spec"].get("initContainers") or []), *self.pod["spec"]["containers"]]

    def _container(self, name: str) -> dict[str, Any]:
        return next(one for one in self._all_containers() if one["name"] == name)

    async def _call(self, method: Any, request: Any, what: str) -> Any:
        try:
            return await method(request)
        except grpc.RpcError as error:
            raise failure_of(error, f"{what} of {self._title}") from error


def failure_text(error: BaseException) -> str:
    return error.sentence() if isinstance(error, Failure) else str(error)


def _start_time(pod: dict[str, Any]) -> float:
    from nacre.kubelet.times import parse

    known = (pod.get("status") or {}).get("startTime")
    return parse(known) if known else time.time()
