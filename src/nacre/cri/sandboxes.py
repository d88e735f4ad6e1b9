"""RunPodSandbox, StopPodSandbox, RemovePodSandbox: what a pod is before it has containers, made in order and undone in reverse."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

from nacre.cri import callers, spec
from nacre.cri.pods import Pods, runtime_root
from nacre.cri.shims import write_json
from nacre.cri.store import SandboxRecord
from nacre.kata import process
from nacre.network import PodNetwork, PortMapping, resolv_conf
from nacre.oci.crash import point
from nacre.oci.errors import Failure, Invalid, Unsupported, encode, from_exception
from nacre.shim.handler import Sandbox
from nacre.wire import cri_pb2 as cri

_NAMESPACES = (("network", "network"), ("ipc", "ipc"))


class Sandboxes:
    """The sandbox half of the runtime service."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods

    async def run(self, config: Any, handler: str) -> str:
        """Answers the new sandbox's id. Raises Failure with everything undone, the name released too."""
        handler = handler or "runc"
        metadata = config.metadata
        title = f"{metadata.namespace}/{metadata.name}"
        what = f"create pod sandbox for {title}"
        self._check(config, handler, what)
        identifier = await self._pods.vms.take() if handler == "kata" else secrets.token_hex(32)
        name = (metadata.name, metadata.namespace, metadata.uid, metadata.attempt)
        try:
            if callers.current().left:  # while a VM was got ready: what it was for may be gone by now
                raise Failure(what=what, cause="its caller has left")
            self._pods.store.reserve(name, identifier, what)
        except Failure:
            await self._pods.vms.give_back(identifier)
            raise
        began = time.monotonic_ns()
        record = SandboxRecord(
            id=identifier, config=config.SerializeToString(), handler=handler, name=name, created_at=time.time_ns()
        )
        try:
            async with AsyncExitStack() as undo:
                undo.callback(self._pods.store.release, name)
                record = await self._make(record, config, undo)
                point("cri.run.made")
                await self._pods.store.put(record)
                undo.pop_all()
        except Exception as error:
            failure = from_exception(what, error)
            self._pods.record(record, "failure", what, encode(failure))
            raise failure from error
        point("cri.run.kept")
        self._pods.record(
            record,
            "cri",
            "RunPodSandbox",
            {"config": _readable(config), "runtime_handler": handler, "pod_sandbox_id": identifier},
            time.monotonic_ns() - began,
        )
        return identifier

    def _check(self, config: Any, handler: str, what: str) -> None:
        if handler == "kata" and not self._pods.vms.offered():
            raise process.missing(self._pods.config.kata.qemu, what)
        if handler not in ("runc", "kata", *self._pods.config.handlers):
            raise Unsupported(
                what=what,
                cause=f"runtime handler {handler} is not configured; this node has {', '.join(handlers(self._pods))}",
                remedy=f"use one of those in the RuntimeClass, or add [handlers.{handler}] to {self._pods.config.etc}/config.toml",
            )
        if not config.metadata.name or not config.metadata.namespace:
            raise Invalid(what=what, cause="metadata.name and metadata.namespace are required")

    async def _make(self, record: SandboxRecord, config: Any, undo: AsyncExitStack) -> SandboxRecord:
        directory = self._pods.directory(record.id)
        warm = self._pods.connections.get(record.id)
        if warm is None:
            os.makedirs(directory, mode=0o711)
        undo.callback(self._pods.forget, record.id)
        sandbox = self._sandbox(record, config)
        spec.check_sysctls(sandbox.sysctls, sandbox.namespaces)
        _furnish(directory, config, sandbox)
        write_json(f"{directory}/sandbox.json", asdict(sandbox))
        shim = warm or await self._pods.spawn(record.id, record.handler)
        undo.push_async_callback(self._pods.remove_own_cgroup, record)
        undo.push_async_callback(_destroy, shim)
        point("cri.run.spawned")
        await shim.ask("create_sandbox", sandbox=asdict(sandbox))
        if "network" not in sandbox.namespaces:
            shutil.copy("/etc/hosts", f"{directory}/hosts")
            return record
        pod = PodNetwork(
            sandbox_id=record.id,
            name=config.metadata.name,
            namespace=config.metadata.namespace,
            uid=config.metadata.uid,
            hostname=config.hostname,
            annotations=dict(config.annotations),
            ports=tuple(
                PortMapping(
                    container_port=port.container_port,
                    host_port=port.host_port,
                    protocol=cri.Protocol.Name(port.protocol),
                    host_ip=port.host_ip,
                )
                for port in config.port_mappings
            ),
        )
        undo.push_async_callback(asyncio.to_thread, self._pods.network.detach, record.id)
        attachment = await asyncio.to_thread(self._pods.network.attach, pod, f"{directory}/ns/net")
        point("cri.run.attached")
        _write_hosts(directory, config, attachment.addresses)
        await shim.ask("network_ready", attachment=asdict(attachment))
        return replace(record, attachment=asdict(attachment))

    def _sandbox(self, record: SandboxRecord, config: Any) -> Sandbox:
        options = config.linux.security_context.namespace_options
        namespaces = {kind: "" for kind, field in _NAMESPACES if getattr(options, field) != cri.NODE}
        if "network" in namespaces:
            namespaces["uts"] = ""
        if options.pid == cri.POD:
            namespaces["pid"] = ""
        if options.userns_options.mode == cri.POD and (options.userns_options.uids or options.userns_options.gids):
            namespaces["user"] = ""
        return Sandbox(
            id=record.id,
            pod_uid=record.name[2],
            directory=self._pods.directory(record.id),
            hostname=config.hostname,
            cgroups_path=self._pods.cgroup_path(record),
            namespaces=namespaces,
            sysctls=dict(config.linux.sysctls),
            resources=spec.resources(config.linux.resources),
            overhead=spec.resources(config.linux.overhead),
            annotations=dict(config.annotations),
            dns=tuple(_resolv_lines(config, self._pods)),
            settings=settings(self._pods, record.handler),
            trace_dir=self._pods.config.trace_dir,
        )

    async def stop(self, record: SandboxRecord, stop_container: Any) -> None:
        """Containers stopped, network detached, namespaces and VM away; the record stays, NOTREADY. Idempotent."""
        async with self._pods.lock(record.id):
            current = self._pods.store.sandboxes.get(record.id)
            if current is None:
                return
            if current.ready and self._pods.connected(record.id) is None:
                await self._pods.shim_died(current)
                current = self._pods.store.sandboxes[record.id]
            ends = [stop_container(container, 0) for container in self._pods.store.containers_of(record.id)]
            if current.ready:
                ends.append(self._pods.store.change(current, ready=False))
            await asyncio.gather(*ends)
            for container in self._pods.store.containers_of(record.id):
                await self._ask(record.id, "delete", container=container.id)
            if current.attachment:
                await asyncio.to_thread(self._pods.network.detach, record.id)
            connection = self._pods.connected(record.id)
            if connection is not None:
                point("cri.stop.before_destroy")
                del self._pods.connections[record.id]  # its hanging up is no death
                await _destroy(connection)
                connection.close()
            await self._pods.remove_own_cgroup(current)

    async def remove(self, record: SandboxRecord, stop_container: Any, clear_away: Any) -> None:
        """Everything of it, its containers too, which `clear_away` is called for; gone in one commit."""
        await self.stop(record, stop_container)
        containers = self._pods.store.containers_of(record.id)
        for container in containers:
            clear_away(container)
        self._pods.forget(record.id)
        current = self._pods.store.sandboxes.get(record.id)
        if current is not None:
            await self._pods.store.remove(*containers, current)
        for container in containers:
            self._pods.tell("deleted", container)

    async def _ask(self, sandbox: str, op: str, **request: Any) -> None:
        connection = self._pods.connected(sandbox)
        if connection is not None:
            await connection.ask(op, **request)


def handlers(pods: Pods) -> dict[str, str]:
    """Handler name → binary, "" for nacre's own. `kata` is there where QEMU is."""
    found = {"runc": ""} | {name: handler.binary for name, handler in pods.config.handlers.items()}
    if pods.vms.offered():
        found["kata"] = ""
    return found


def settings(pods: Pods, handler: str) -> dict[str, Any]:
    """What a shim's handler needs of the configuration."""
    config = pods.config
    known = config.handlers.get(handler)
    return {
        "runc_root": runtime_root(config, handler),
        "binary": known.binary if known else "",
        "kata": asdict(config.kata),
        "data": config.data,
        "state": config.state,
        "cgroup_root": config.cgroup_root,
        "patience": config.patience,
    }


async def _destroy(shim: Any) -> None:
    try:
        await shim.ask("destroy")
    except Failure as failure:
        if failure.code != "ShimDied":
            raise


def _furnish(directory: str, config: Any, sandbox: Sandbox) -> None:
    """The files that every container of the pod gets unless its kubelet brings its own."""
    _write(f"{directory}/resolv.conf", "\n".join(sandbox.dns) + "\n")
    _write(f"{directory}/hostname", (config.hostname or os.uname().nodename) + "\n")


def _write_hosts(directory: str, config: Any, addresses: list[str]) -> None:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{address.partition('/')[0]}\t{config.hostname}" for address in addresses if config.hostname]
    _write(f"{directory}/hosts", "\n".join(lines) + "\n")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _resolv_lines(config: Any, pods: Pods) -> list[str]:
    dns = config.dns_config
    if not (dns.servers or dns.searches or dns.options):
        return list(resolv_conf(pods.config))
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    return lines + ([f"options {' '.join(dns.options)}"] if dns.options else [])


def _readable(message: Any) -> Any:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)
