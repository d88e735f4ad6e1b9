"""RuntimeService over gRPC: each method translates, calls `sandboxes` or `containers`, and turns a Failure into a status."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from nacre import __version__
from nacre.cri import answers, callers, spec
from nacre.cri.containers import Containers
from nacre.cri.pods import Pods, background
from nacre.cri.sandboxes import Sandboxes, handlers
from nacre.cri.store import ContainerRecord, SandboxRecord
from nacre.cri.streaming import Streaming
from nacre.oci.errors import Failure, NotFound, from_exception
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import PROGRESS, abort

log = logging.getLogger("nacre.cri")
_EVENTS = {
    "created": cri.CONTAINER_CREATED_EVENT,
    "started": cri.CONTAINER_STARTED_EVENT,
    "stopped": cri.CONTAINER_STOPPED_EVENT,
    "deleted": cri.CONTAINER_DELETED_EVENT,
}
EVENTS_KEPT = 4096  # for one caller that does not read them
Method = Callable[..., Awaitable[Any]]


def answered(method: Method) -> Method:
    """A Failure leaves as a gRPC status whose details are its sentence; anything else is in the log too, with its traceback."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> Any:
        callers.enter(context)
        try:
            return await method(self, request)
        except Failure as failure:
            await abort(context, failure)
        except Exception as error:
            log.exception("%s", method.__name__)
            await abort(context, from_exception(method.__name__, error))

    return call


def finished(undo: str = "") -> Callable[[Method], Method]:
    """For what changes a pod: it goes on to its end when its caller leaves, since a half-done act helps nobody.

    `undo` names a method that then takes the answer back: nobody was told the id of what was made.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        async def call(self: Any, request: Any) -> Any:
            work = asyncio.ensure_future(method(self, request))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                callers.current().left = True
                background(_abandoned(self, work, method.__name__, undo))
                raise

        return call

    return decorate


async def _abandoned(service: Any, work: asyncio.Future[Any], name: str, undo: str) -> None:
    try:
        answer = await work
    except Failure as failure:
        log.warning("%s, whose caller had left: %s", name, failure)
        return
    if undo:
        log.info("%s is taken back: its caller had left", name)
        await getattr(service, undo)(answer)


class RuntimeService:
    """runtime.v1.RuntimeService."""

    def __init__(self, pods: Pods, streaming: Streaming) -> None:
        self._pods, self._store, self._streaming = pods, pods.store, streaming
        self.sandboxes, self.containers = Sandboxes(pods), Containers(pods)

    @answered
    async def Version(self, request: Any) -> Any:
        return cri.VersionResponse(version="0.1.0", runtime_name="nacre", runtime_version=__version__, runtime_api_version="v1")

    @answered
    async def Status(self, request: Any) -> Any:
        network = self._pods.network.status()
        conditions = [
            cri.RuntimeCondition(type="RuntimeReady", status=True),
            cri.RuntimeCondition(type="NetworkReady", status=network.ready, reason=network.reason, message=network.message),
        ]
        known = [cri.RuntimeHandler(name=name) for name in ("", *handlers(self._pods))]
        info = {PROGRESS: json.dumps(self._pods.doing)} if request.verbose else {}
        return cri.StatusResponse(status=cri.RuntimeStatus(conditions=conditions), runtime_handlers=known, info=info)

    @answered
    async def RuntimeConfig(self, request: Any) -> Any:
        driver = cri.SYSTEMD if self._pods.config.cgroup_driver == "systemd" else cri.CGROUPFS
        return cri.RuntimeConfigResponse(linux=cri.LinuxRuntimeConfiguration(cgroup_driver=driver))

    @answered
    async def UpdateRuntimeConfig(self, request: Any) -> Any:
        return cri.UpdateRuntimeConfigResponse()

    @answered
    @finished(undo="_take_back_sandbox")
    async def RunPodSandbox(self, request: Any) -> Any:
        return cri.RunPodSandboxResponse(pod_sandbox_id=await self.sandboxes.run(request.config, request.runtime_handler))

    @answered
    @finished()
    async def StopPodSandbox(self, request: Any) -> Any:
        record = self._maybe(self._store.sandbox, request.pod_sandbox_id)
        if record is not None:
            await self.sandboxes.stop(record, self.containers.stop)
        return cri.StopPodSandboxResponse()

    @answered
    @finished()
    async def RemovePodSandbox(self, request: Any) -> Any:
        record = self._maybe(self._store.sandbox, request.pod_sandbox_id)
        if record is not None:
            await self.sandboxes.remove(record, self.containers.stop, self.containers.clear_away)
        return cri.RemovePodSandboxResponse()

    @answered
    async def PodSandboxStatus(self, request: Any) -> Any:
        record = self._store.sandbox(request.pod_sandbox_id)
        containers = [self._container_status(one) for one in self._store.containers_of(record.id)]
        info = await self._info(record, "") if request.verbose else {}
        return cri.PodSandboxStatusResponse(
            status=answers.sandbox_status(record), info=info, containers_statuses=containers, timestamp=time.time_ns()
        )

    @answered
    async def ListPodSandbox(self, request: Any) -> Any:
        return cri.ListPodSandboxResponse(items=self._sandbox_items(request.filter))

    async def StreamPodSandboxes(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for item in self._sandbox_items(request.filter):
            yield cri.StreamPodSandboxesResponse(pod_sandboxes=[item])

    @answered
    @finished(undo="_take_back_container")
    async def CreateContainer(self, request: Any) -> Any:
        sandbox = self._store.sandbox(request.pod_sandbox_id)
        given = request.sandbox_config if request.HasField("sandbox_config") else cri.PodSandboxConfig.FromString(sandbox.config)
        return cri.CreateContainerResponse(container_id=await self.containers.create(sandbox, request.config, given))

    @answered
    @finished()
    async def StartContainer(self, request: Any) -> Any:
        await self.containers.start(self._store.container(request.container_id))
        return cri.StartContainerResponse()

    @answered
    @finished()
    async def StopContainer(self, request: Any) -> Any:
        record = self._maybe(self._store.container, request.container_id)
        if record is not None:
            await self.containers.stop(record, request.timeout)
        return cri.StopContainerResponse()

    @answered
    @finished()
    async def RemoveContainer(self, request: Any) -> Any:
        record = self._maybe(self._store.container, request.container_id)
        if record is not None:
            await self.containers.remove(record)
        return cri.RemoveContainerResponse()

    @answered
    async def ListContainers(self, request: Any) -> Any:
        return cri.ListContainersResponse(containers=[answers.container_item(one) for one in self._containers(request.filter)])

    async def StreamContainers(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for record in self._containers(request.filter):
            yield cri.StreamContainersResponse(containers=[answers.container_item(record)])

    @answered
    async def ContainerStatus(self, request: Any) -> Any:
        record = self._store.container(request.container_id)
        info = await self._info(self._store.sandbox(record.sandbox), record.id) if request.verbose else {}
        return cri.ContainerStatusResponse(status=self._container_status(record), info=info)

    @answered
    @finished()
    async def UpdateContainerResources(self, request: Any) -> Any:
        record = self._store.container(request.container_id)
        await self._pods.connection(record.sandbox).ask("update", container=record.id, resources=spec.resources(request.linux))
        config = cri.ContainerConfig.FromString(record.config)
        config.linux.resources.MergeFrom(request.linux)
        await self._store.put(replace(record, config=config.SerializeToString()))
        return cri.UpdateContainerResourcesResponse()

    @answered
    async def ReopenContainerLog(self, request: Any) -> Any:
        record = self._store.container(request.container_id)
        await self._pods.connection(record.sandbox).ask("reopen_log", container=record.id)
        return cri.ReopenContainerLogResponse()

    @answered
    async def ExecSync(self, request: Any) -> Any:
        record = self._store.container(request.container_id)
        out, err, code = await self.containers.exec_sync(record, list(request.cmd), request.timeout)
        return cri.ExecSyncResponse(stdout=out, stderr=err, exit_code=code)

    @answered
    async def Exec(self, request: Any) -> Any:
        return cri.ExecResponse(url=self._streaming.offer("exec", self._store.container(request.container_id), request))

    @answered
    async def Attach(self, request: Any) -> Any:
        return cri.AttachResponse(url=self._streaming.offer("attach", self._store.container(request.container_id), request))

    @answered
    async def ContainerStats(self, request: Any) -> Any:
        return cri.ContainerStatsResponse(stats=await self._stats(self._store.container(request.container_id)))

    @answered
    async def ListContainerStats(self, request: Any) -> Any:
        wanted = [record for record in self._containers(request.filter) if record.state == "running"]
        return cri.ListContainerStatsResponse(stats=await _each(self._stats(record) for record in wanted))

    @answered
    async def PodSandboxStats(self, request: Any) -> Any:
        return cri.PodSandboxStatsResponse(stats=await self._sandbox_stats(self._store.sandbox(request.pod_sandbox_id)))

    @answered
    async def ListPodSandboxStats(self, request: Any) -> Any:
        wanted = [record for record in self._sandboxes(request.filter) if record.ready]
        return cri.ListPodSandboxStatsResponse(stats=await _each(self._sandbox_stats(record) for record in wanted))

    async def StreamContainerStats(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for record in self._containers(request.filter):
            if record.state == "running":
                yield cri.StreamContainerStatsResponse(container_stats=await _each([self._stats(record)]))

    async def StreamPodSandboxStats(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for record in self._sandboxes(request.filter):
            if record.ready:
                yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=await _each([self._sandbox_stats(record)]))

    async def GetContainerEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Every change of a container from now on, until the caller hangs up; one that does not read is cut off, to list anew."""
        queue: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()

        def listen(event: str, record: Any) -> None:
            if queue.qsize() < EVENTS_KEPT:
                queue.put_nowait((event, record))
            else:
                self._pods.listeners.remove(listen)
                queue.put_nowait(None)

        self._pods.listeners.append(listen)
        try:
            while (told := await queue.get()) is not None:
                event, record = told
                if isinstance(record, ContainerRecord):
                    yield self._event(event, record)
        finally:
            if listen in self._pods.listeners:
                self._pods.listeners.remove(listen)
        words = f"{EVENTS_KEPT} events wait that were not read: list the containers and ask for events again"
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)

    def _event(self, event: str, record: ContainerRecord) -> Any:
        sandbox = self._store.sandboxes.get(record.sandbox)
        return cri.ContainerEventResponse(
            container_id=record.id,
            container_event_type=_EVENTS[event],
            created_at=time.time_ns(),
            pod_sandbox_status=answers.sandbox_status(sandbox) if sandbox else None,
            containers_statuses=[self._container_status(one) for one in self._store.containers_of(record.sandbox)],
        )

    def _container_status(self, record: ContainerRecord) -> Any:
        return answers.container_status(record, self._pods.blocked.get(record.id, ""))

    async def _take_back_sandbox(self, answer: Any) -> None:
        record = self._store.sandbox(answer.pod_sandbox_id)
        await self.sandboxes.remove(record, self.containers.stop, self.containers.clear_away)

    async def _take_back_container(self, answer: Any) -> None:
        await self.containers.remove(self._store.container(answer.container_id))

    async def _stats(self, record: ContainerRecord) -> Any:
        stats, _none = await self._pods.connection(record.sandbox).ask("stats", container=record.id)
        return answers.container_stats(record, stats, time.time_ns())

    async def _sandbox_stats(self, record: SandboxRecord) -> Any:
        running = [one for one in self._store.containers_of(record.id) if one.state == "running"]
        containers = await _each(self._stats(one) for one in running)
        stats, _none = await self._pods.connection(record.id).ask("stats", container="")
        return answers.sandbox_stats(record, stats, containers, time.time_ns())

    async def _info(self, record: SandboxRecord, container: str) -> dict[str, str]:
        """What crictl inspect shows below the status: JSON under "info"."""
        config: Any = cri.PodSandboxConfig.FromString(record.config)
        document: dict[str, Any] = {"sandboxID": record.id, "pid": 0, "runtimeHandler": record.handler, "failure": record.failure}
        connection = self._pods.connected(record.id)
        if container:
            config = cri.ContainerConfig.FromString(self._store.container(container).config)
            document["runtimeSpec"] = self._pods.document(record.id, container)
        if container and connection is not None:
            state, _none = await connection.ask("state")
            document["pid"] = state["containers"].get(container, {}).get("pid", 0)
        document["config"] = MessageToDict(config, preserving_proto_field_name=True)
        return {"info": json.dumps(document)}

    def _sandbox_items(self, wanted: Any) -> list[Any]:
        return [answers.sandbox_item(record) for record in self._sandboxes(wanted)]

    def _sandboxes(self, wanted: Any) -> list[SandboxRecord]:
        found = sorted(self._store.sandboxes.values(), key=lambda record: record.created_at)
        if wanted.id:
            found = [record for record in found if record.id.startswith(wanted.id)]
        state = getattr(wanted, "state", None)
        if state is not None and wanted.HasField("state"):
            found = [record for record in found if answers.sandbox_state(record) == state.state]
        return [record for record in found if _labelled(cri.PodSandboxConfig.FromString(record.config).labels, wanted)]

    def _containers(self, wanted: Any) -> list[ContainerRecord]:
        found = sorted(self._store.containers.values(), key=lambda record: record.created_at)
        if wanted.id:
            found = [record for record in found if record.id.startswith(wanted.id)]
        if wanted.pod_sandbox_id:
            found = [record for record in found if record.sandbox.startswith(wanted.pod_sandbox_id)]
        state = getattr(wanted, "state", None)
        if state is not None and wanted.HasField("state"):
            found = [record for record in found if answers.container_item(record).state == state.state]
        return [record for record in found if _labelled(cri.ContainerConfig.FromString(record.config).labels, wanted)]

    def _maybe(self, find: Callable[[str], Any], identifier: str) -> Any:
        """The record, or None for what is gone: stopping and removing it succeeds."""
        try:
            return find(identifier)
        except NotFound:
            return None


def _labelled(labels: Any, wanted: Any) -> bool:
    return all(labels.get(key) == value for key, value in wanted.label_selector.items())


async def _each(asked: Iterable[Awaitable[Any]]) -> list[Any]:
    """All answers at once; a pod that cannot answer (it is ending, its shim died) is left out and does not keep the others."""
    answered_or_not = await asyncio.gather(*asked, return_exceptions=True)
    for one in answered_or_not:
        if isinstance(one, BaseException) and not isinstance(one, Failure):
            raise one
    return [one for one in answered_or_not if not isinstance(one, BaseException)]
