"""Records as the CRI's messages. Pure."""

from __future__ import annotations

from typing import Any

from nacre.cri.store import ContainerRecord, SandboxRecord
from nacre.images import Image
from nacre.wire import cri_pb2 as cri

_STATES = {"created": cri.CONTAINER_CREATED, "running": cri.CONTAINER_RUNNING, "exited": cri.CONTAINER_EXITED}


def sandbox_item(record: SandboxRecord) -> Any:
    config = cri.PodSandboxConfig.FromString(record.config)
    return cri.PodSandbox(
        id=record.id,
        metadata=config.metadata,
        state=sandbox_state(record),
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.handler,
    )


def sandbox_status(record: SandboxRecord) -> Any:
    config = cri.PodSandboxConfig.FromString(record.config)
    addresses = [address.partition("/")[0] for address in record.attachment.get("addresses", ())]
    return cri.PodSandboxStatus(
        id=record.id,
        metadata=config.metadata,
        state=sandbox_state(record),
        created_at=record.created_at,
        network=cri.PodSandboxNetworkStatus(
            ip=addresses[0] if addresses else "", additional_ips=[cri.PodIP(ip=address) for address in addresses[1:]]
        ),
        linux=cri.LinuxPodSandboxStatus(namespaces=cri.Namespace(options=config.linux.security_context.namespace_options)),
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.handler,
    )


def sandbox_state(record: SandboxRecord) -> cri.PodSandboxState:
    return cri.SANDBOX_READY if record.ready else cri.SANDBOX_NOTREADY


def container_item(record: ContainerRecord) -> Any:
    config = cri.ContainerConfig.FromString(record.config)
    return cri.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox,
        metadata=config.metadata,
        image=config.image,
        image_ref=record.image,
        image_id=record.image,
        state=_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
    )


def container_status(record: ContainerRecord, blocked: str = "") -> Any:
    """`blocked`: why the log of a running container cannot be written."""
    config = cri.ContainerConfig.FromString(record.config)
    uid, gid, groups = record.user
    return cri.ContainerStatus(
        id=record.id,
        metadata=config.metadata,
        state=_STATES[record.state],
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image=_named(config.image, record.image_name),
        image_ref=record.image_reference,
        image_id=record.image,
        reason=record.reason or ("LogBlocked" if blocked else ""),
        message=record.message
        or (f"write {record.log_path}: {blocked}; the container waits, no line is lost" if blocked else ""),
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=record.log_path,
        resources=cri.ContainerResources(linux=config.linux.resources),
        user=cri.ContainerUser(linux=cri.LinuxContainerUser(uid=uid, gid=gid, supplemental_groups=groups)),
        stop_signal=config.stop_signal,
    )


def _named(spec: Any, name: str) -> Any:
    """The image as asked for, by its name: a kubelet asks by the id and shows people what it is told here."""
    named = cri.ImageSpec()
    named.CopyFrom(spec)
    named.image = name or spec.image
    return named


def image(found: Image) -> Any:
    user = found.user.partition(":")[0]
    return cri.Image(
        id=found.id,
        repo_tags=found.references,
        repo_digests=found.digests,
        size=found.size,
        uid=cri.Int64Value(value=int(user)) if user.isdigit() else None,
        username="" if user.isdigit() else user,
        spec=cri.ImageSpec(image=found.references[0] if found.references else found.id),
        pinned=found.pinned,
    )


def cpu(stats: dict[str, Any], at_ns: int) -> Any:
    return cri.CpuUsage(timestamp=at_ns, usage_core_nano_seconds=_u64(stats["cpu_ns"]))


def memory(stats: dict[str, Any], at_ns: int) -> Any:
    limit = stats.get("memory_limit_bytes") or 0
    return cri.MemoryUsage(
        timestamp=at_ns,
        working_set_bytes=_u64(stats["working_set_bytes"]),
        usage_bytes=_u64(stats["memory_bytes"]),
        rss_bytes=_u64(stats["rss_bytes"]),
        page_faults=_u64(stats["page_faults"]),
        major_page_faults=_u64(stats["major_page_faults"]),
        available_bytes=_u64(max(0, limit - stats["working_set_bytes"])) if limit else None,
    )


def container_stats(record: ContainerRecord, stats: dict[str, Any], at_ns: int) -> Any:
    config = cri.ContainerConfig.FromString(record.config)
    attributes = cri.ContainerAttributes(
        id=record.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
    )
    return cri.ContainerStats(attributes=attributes, cpu=cpu(stats, at_ns), memory=memory(stats, at_ns))


def sandbox_stats(record: SandboxRecord, stats: dict[str, Any], containers: list[Any], at_ns: int) -> Any:
    config = cri.PodSandboxConfig.FromString(record.config)
    attributes = cri.PodSandboxAttributes(
        id=record.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
    )
    linux = cri.LinuxPodSandboxStats(
        cpu=cpu(stats, at_ns),
        memory=memory(stats, at_ns),
        process=cri.ProcessUsage(timestamp=at_ns, process_count=_u64(stats["pids"])),
        containers=containers,
    )
    return cri.PodSandboxStats(attributes=attributes, linux=linux)


def _u64(value: int) -> Any:
    return cri.UInt64Value(value=int(value))
