"""CreateContainer, StartContainer, StopContainer, RemoveContainer, ExecSync: one container's life inside its sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

from nacre.cri import spec
from nacre.cri.pods import Pods, busy_with, remove_bundle
from nacre.cri.store import ContainerRecord, SandboxRecord
from nacre.images import User
from nacre.linux import cgroup_names
from nacre.oci.crash import point
from nacre.oci.errors import Failure, Invalid, NotFound, WrongStatus, encode, from_exception
from nacre.wire import cri_pb2 as cri

EXEC_OUTPUT_LIMIT = 16 * 1024 * 1024  # bytes of stdout and stderr together, in one gRPC answer


class ExecTimeout(Failure):
    """An ExecSync command outlived the caller's timeout and was killed."""


class OutputTooLarge(Failure):
    """An ExecSync command printed more than one answer holds."""


class StillRunning(Failure):
    """A container did not end for SIGKILL."""


DIE_S = 60.0  # after SIGKILL; a kubelet gives StopContainer its grace and two minutes


class Containers:
    """The container half of the runtime service."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods

    async def create(self, sandbox: SandboxRecord, config: Any, sandbox_config: Any) -> str:
        """Answers the new container's id; everything undone on failure."""
        what = f"create container {config.metadata.name} of pod {sandbox.name[1]}/{sandbox.name[0]}"
        if not sandbox.ready:
            raise WrongStatus(what=what, cause="its pod sandbox is not ready", remedy="the kubelet makes a new one")
        identifier = secrets.token_hex(32)
        name = (sandbox.id, config.metadata.name, config.metadata.attempt)
        self._pods.store.reserve(name, identifier, what)
        began = time.monotonic_ns()
        try:
            async with AsyncExitStack() as undo:
                undo.callback(self._pods.store.release, name)
                record = await self._make(identifier, sandbox, config, sandbox_config, undo)
                await self._pods.store.put(record)
                undo.pop_all()
        except Exception as error:
            failure = from_exception(what, error)
            self._pods.record(sandbox, "failure", what, encode(failure))
            raise failure from error
        point("cri.create.kept")
        self._pods.record(
            sandbox,
            "cri",
            "CreateContainer",
            {"name": config.metadata.name, "container_id": identifier},
            time.monotonic_ns() - began,
        )
        self._pods.tell("created", record)
        return identifier

    async def _make(
        self, identifier: str, sandbox: SandboxRecord, config: Any, sandbox_config: Any, undo: AsyncExitStack
    ) -> ContainerRecord:
        image = self._pods.images.get(config.image.image)
        if image is None:
            raise NotFound(what=f"use image {config.image.image}", cause="it is not on this node", remedy="pull it first")
        stop_signal = _stop_signal(config, image)
        signal_number(stop_signal)  # a name that means nothing is refused now, not when it is needed
        user = self._user(config, image)
        undo.callback(self._pods.images.release, identifier)
        if sandbox.handler == "kata":
            rootfs = await self._pods.images.vm_rootfs(image, identifier)
        else:
            rootfs = self._pods.images.rootfs(image, identifier)
        document = spec.build(sandbox_config, config, image, await self._around(sandbox, identifier, config, user))
        bundle = f"{self._pods.directory(sandbox.id)}/containers/{identifier}"
        os.makedirs(bundle)
        undo.callback(remove_bundle, bundle)
        with open(f"{bundle}/config.json", "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
        self._pods.record(sandbox, "oci", f"config.json of {config.metadata.name}", document)
        log_path = os.path.join(sandbox_config.log_directory, config.log_path)
        log_path = log_path if config.log_path and sandbox_config.log_directory else ""
        if log_path:
            os.makedirs(os.path.dirname(log_path), exist_ok=True)
        connection = self._pods.connection(sandbox.id)
        await connection.ask(
            "create",
            container=identifier,
            bundle=bundle,
            rootfs=asdict(rootfs),
            log_path=log_path,
            stdin=config.stdin,
            tty=config.tty,
        )
        undo.push_async_callback(connection.ask, "delete", container=identifier)
        point("cri.create.made")
        return ContainerRecord(
            id=identifier,
            sandbox=sandbox.id,
            config=config.SerializeToString(),
            name=(config.metadata.name, config.metadata.attempt),
            image=image.id,
            image_reference=image.pulled_as or image.id,
            image_name=image.called(config.image.user_specified_image or config.image.image),
            created_at=time.time_ns(),
            log_path=log_path,
            stop_signal=stop_signal,
            user=(user.uid, user.gid, user.groups),
        )

    def _user(self, config: Any, image: Any) -> User:
        security = config.linux.security_context
        asked = security.run_as_username or (str(security.run_as_user.value) if security.HasField("run_as_user") else "")
        user: User = self._pods.images.resolve_user(image, asked or image.user)
        if security.HasField("run_as_group"):
            user = User(user.uid, security.run_as_group.value, user.groups)
        if security.supplemental_groups_policy == cri.Strict:
            user = User(user.uid, user.gid, ())
        return user

    async def _around(self, sandbox: SandboxRecord, identifier: str, config: Any, user: User) -> spec.Surroundings:
        options = config.linux.security_context.namespace_options
        return spec.Surroundings(
            sandbox_id=sandbox.id,
            container_id=identifier,
            directory=self._pods.directory(sandbox.id),
            namespaces=await self._namespaces(sandbox, options),
            cgroups_path=cgroup_names.as_cgroups_path(self._pods.cgroup_path(sandbox, identifier)),
            user=user,
            host_ipc=options.ipc == cri.NODE,
        )

    async def _namespaces(self, sandbox: SandboxRecord, options: Any) -> dict[str, str]:
        """OCI kind → path to join, "" for a new one; absent: the host's."""
        directory = self._pods.directory(sandbox.id)
        namespaces: dict[str, str] = {}
        if options.network != cri.NODE:
            namespaces |= {"network": f"{directory}/ns/net", "uts": f"{directory}/ns/uts"}
        if options.ipc != cri.NODE:
            namespaces["ipc"] = f"{directory}/ns/ipc"
        if options.pid == cri.POD:
            namespaces["pid"] = f"{directory}/ns/pid"
        elif options.pid == cri.TARGET:
            namespaces["pid"] = f"/proc/{await self._pid_of(options.target_id)}/ns/pid"
        elif options.pid == cri.CONTAINER:
            namespaces["pid"] = ""
        return namespaces

    async def _pid_of(self, container: str) -> int:
        target = self._pods.store.container(container)
        if target.state != "running":
            raise WrongStatus(what=f"join the processes of container {target.name[0]}", cause=f"it is {target.state}")
        state, _none = await self._pods.connection(target.sandbox).ask("state")
        return int(state["containers"][target.id]["pid"])

    async def start(self, record: ContainerRecord) -> None:
        """The process runs when this returns. Raises Failure, then the container is exited with 128 and reason StartError."""
        if record.state != "created":
            raise WrongStatus(what=f"start container {record.name[0]}", cause=f"it is {record.state}")
        sandbox = self._pods.store.sandbox(record.sandbox)
        began = time.monotonic_ns()
        try:
            answer, _none = await self._pods.connection(record.sandbox).ask("start", container=record.id)
        except Failure as failure:
            self._pods.record(sandbox, "failure", failure.what, encode(failure))
            now = time.time_ns()
            failed = replace(
                record, started_at=now, finished_at=now, exit_code=128, reason="StartError", message=failure.sentence()
            )
            await self._pods.store.put(failed)
            self._pods.ended(record.id).set()
            raise
        point("cri.start.running")
        current = self._pods.store.containers[record.id]
        if not current.started_at:  # not waited for: its shim knows, and what ends the shim ends the container
            self._pods.store.note(current, started_at=answer["at_ns"])
        self._pods.record(sandbox, "cri", "StartContainer", {"container_id": record.id}, time.monotonic_ns() - began)
        self._pods.tell("started", self._pods.store.containers[record.id])

    async def stop(self, record: ContainerRecord, grace_s: int) -> None:
        """Its stop signal, `grace_s` seconds, then SIGKILL to all of it. Returns when it has ended. Idempotent."""
        current = self._pods.store.containers.get(record.id)
        if current is None or current.finished_at:
            return
        connection = self._pods.connection(record.sandbox)
        ended = self._pods.ended(record.id)
        if current.started_at and grace_s > 0:
            await connection.ask("kill", container=record.id, signal=signal_number(current.stop_signal))
            try:
                await asyncio.wait_for(ended.wait(), grace_s)
                return
            except TimeoutError:
                pass  # the grace is over: what follows is the promise of StopContainer
        await connection.ask("kill", container=record.id, signal=int(signal.SIGKILL), everyone=True)
        try:
            await asyncio.wait_for(ended.wait(), DIE_S)
        except TimeoutError:
            raise StillRunning(
                what=f"stop container {record.name[0]}",
                cause=f"it has not ended {DIE_S:.0f} s after SIGKILL: a process of it hangs in the kernel",
                evidence=busy_with(self._pods.directory(record.sandbox)),
            ) from None

    async def remove(self, record: ContainerRecord) -> None:
        await self.stop(record, 0)
        connection = self._pods.connected(record.sandbox)
        if connection is not None:
            await connection.ask("delete", container=record.id)
        self.clear_away(record)
        current = self._pods.store.containers.get(record.id)
        if current is not None:
            await self._pods.store.remove(current)
            self._pods.tell("deleted", current)

    def clear_away(self, record: ContainerRecord) -> None:
        """Bundle and snapshot of a container that its shim holds no more."""
        remove_bundle(f"{self._pods.directory(record.sandbox)}/containers/{record.id}")
        self._pods.images.release(record.id)
        self._pods.forget_container(record.id)

    async def exec_sync(self, record: ContainerRecord, command: list[str], timeout_s: int) -> tuple[bytes, bytes, int]:
        """(stdout, stderr, exit code); waits for whoever holds the output open. Raises ExecTimeout, OutputTooLarge."""
        what = f"run {command[0] if command else 'a command'} in container {record.name[0]}"
        async with _Capture() as capture:
            exec_id, end = await self.begin_exec(
                record, command, {"stdout": capture.out.give(), "stderr": capture.err.give()}, tty=False
            )
            try:
                async with asyncio.timeout(timeout_s or None):
                    await asyncio.gather(capture.out.ended, capture.err.ended)
                    code = int((await end)["code"])
            except TimeoutError:
                await self.kill_exec(record, exec_id)
                raise ExecTimeout(what=what, cause=f"it did not end within {timeout_s} s and was killed") from None
            except OutputTooLarge as failure:
                await self.kill_exec(record, exec_id)
                failure.what = what
                raise
            except asyncio.CancelledError:  # the caller has left: nobody wants the rest
                await self.kill_exec(record, exec_id)
                raise
            return bytes(capture.out.data), bytes(capture.err.data), code

    async def begin_exec(
        self, record: ContainerRecord, command: list[str], streams: dict[str, int], *, tty: bool
    ) -> tuple[str, Any]:
        """Start `command`; `streams` are our descriptors for it, closed here. Answers (exec id, future of its end)."""
        exec_id = secrets.token_hex(8)
        end = self._pods.exec_end(record.id, exec_id)
        try:
            self._must_run(record, command)
            process = spec.exec_process(self._process(record), command, tty=tty)
            await self._pods.connection(record.sandbox).ask(
                "execute", list(streams.values()), container=record.id, exec_id=exec_id, process=process, streams=list(streams)
            )
        except BaseException:
            end.cancel()
            raise
        finally:
            for fd in streams.values():
                os.close(fd)
        return exec_id, end

    async def begin_terminal(self, record: ContainerRecord, command: list[str]) -> tuple[str, Any, int]:
        """The same on a terminal of its own: (exec id, future of its end, console, the caller's)."""
        self._must_run(record, command)
        exec_id = secrets.token_hex(8)
        end = self._pods.exec_end(record.id, exec_id)
        process = spec.exec_process(self._process(record), command, tty=True)
        try:
            _answer, (console,) = await self._pods.connection(record.sandbox).ask(
                "execute", container=record.id, exec_id=exec_id, process=process, streams=[]
            )
        except BaseException:
            end.cancel()
            raise
        return exec_id, end, console

    async def attach(self, record: ContainerRecord, streams: dict[str, int]) -> None:
        """Connect `streams` (our descriptors, closed here) to the running container's."""
        once = cri.ContainerConfig.FromString(record.config).stdin_once
        try:
            await self._pods.connection(record.sandbox).ask(
                "attach", list(streams.values()), container=record.id, streams=list(streams), stdin_once=once
            )
        finally:
            for fd in streams.values():
                os.close(fd)

    async def resize(self, record: ContainerRecord, width: int, height: int, exec_id: str = "") -> None:
        connection = self._pods.connection(record.sandbox)
        await connection.ask("resize", container=record.id, exec_id=exec_id, width=width, height=height)

    async def kill_exec(self, record: ContainerRecord, exec_id: str, number: int = signal.SIGKILL) -> None:
        connection = self._pods.connection(record.sandbox)
        await connection.ask("kill_exec", container=record.id, exec_id=exec_id, signal=int(number))

    def _must_run(self, record: ContainerRecord, command: list[str]) -> None:
        if record.state != "running":
            raise WrongStatus(what=f"run {' '.join(command)[:80]} in container {record.name[0]}", cause=f"it is {record.state}")

    def _process(self, record: ContainerRecord) -> dict[str, Any]:
        with open(f"{self._pods.directory(record.sandbox)}/containers/{record.id}/config.json", "rb") as file:
            process: dict[str, Any] = json.load(file)["process"]
            return process


class _Pipe:
    """One captured stream: its read end in the event loop, its write end given away once."""

    def __init__(self, limit: list[int]) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self._limit = limit  # shared: bytes left
        self.data = bytearray()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._read, self._readable)

    def give(self) -> int:
        given, self._write = self._write, -1
        return given

    def close(self) -> None:
        self._loop.remove_reader(self._read)
        os.close(self._read)
        if self._write >= 0:
            os.close(self._write)

    def _readable(self) -> None:
        try:
            data = os.read(self._read, 1 << 16)
        except BlockingIOError:
            return
        self.data += data
        self._limit[0] -= len(data)
        if self.ended.done():
            return
        if not data:
            self._loop.remove_reader(self._read)
            self.ended.set_result(None)
        elif self._limit[0] < 0:
            self._loop.remove_reader(self._read)
            self.ended.set_exception(
                OutputTooLarge(
                    what="", cause=f"it printed more than {EXEC_OUTPUT_LIMIT} bytes", remedy="use `kubectl exec`, which streams"
                )
            )


class _Capture:
    """stdout and stderr of one command, within one limit."""

    async def __aenter__(self) -> _Capture:
        limit = [EXEC_OUTPUT_LIMIT]
        self.out, self.err = _Pipe(limit), _Pipe(limit)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.out.close()
        self.err.close()


def _stop_signal(config: Any, image: Any) -> str:
    if config.stop_signal:
        return cri.Signal.Name(config.stop_signal)
    return str((image.config.get("config") or {}).get("StopSignal") or "SIGTERM")


def signal_number(name: str) -> int:
    """15 for "SIGTERM", "TERM" or "15"; SIGRTMIN+3 and the like also as CRI spells them. Raises Invalid."""
    upper = name.upper().removeprefix("SIG")
    if match := re.fullmatch("(RTMINPLUS|RTMIN[+]|RTMAXMINUS|RTMAX-|)([0-9]{1,2})", upper):
        base = {"": 0, "RTMI": signal.SIGRTMIN, "RTMA": signal.SIGRTMAX}[match[1][:4]]
        number = base - int(match[2]) if base == signal.SIGRTMAX else base + int(match[2])
    else:
        number = getattr(signal, f"SIG{upper}", 0) if upper.isalnum() else 0  # SIG_IGN is no signal
    if 0 < number < signal.NSIG:
        return int(number)
    raise Invalid(
        what=f"use {name[:80]} as stop signal", cause="there is no signal of that name", remedy="use SIGTERM or the like"
    )
