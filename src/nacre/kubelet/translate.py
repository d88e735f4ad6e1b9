"""A pod as CRI messages: PodSandboxConfig and ContainerConfig, with the labels by which a later kubelet knows its own."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nacre.config import Config
from nacre.kubelet import names, resources
from nacre.kubelet.expand import ConfigError, Sources, environment, expanded
from nacre.kubelet.volumes import PodVolumes, kind_of
from nacre.linux import paths
from nacre.linux.libc import owned
from nacre.wire import cri_pb2 as cri

BENEATH = paths.Resolve.BENEATH | paths.Resolve.NO_MAGICLINKS
UID_LABEL, CONTAINER_LABEL = "io.kubernetes.pod.uid", "io.kubernetes.container.name"
MOUNTS_ANNOTATION = "nacre.dev/mounts"  # what each mount means, for a runtime that cannot bind host directories
_PROTOCOLS = {"TCP": cri.TCP, "UDP": cri.UDP, "SCTP": cri.SCTP}
_PROFILES = {
    "RuntimeDefault": cri.SecurityProfile.RuntimeDefault,
    "Unconfined": cri.SecurityProfile.Unconfined,
    "Localhost": cri.SecurityProfile.Localhost,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a pod's messages need beside the pod."""

    config: Config
    volumes: PodVolumes
    cgroup_parent: str
    node_memory: int

    def log_directory(self, pod: Mapping[str, Any]) -> str:
        metadata = pod["metadata"]
        return f"{self.config.log_dir}/{metadata['namespace']}_{metadata['name']}_{metadata['uid']}"


def sandbox_config(pod: Mapping[str, Any], attempt: int, frame: Frame) -> Any:
    metadata, spec = pod["metadata"], pod["spec"]
    security = spec.get("securityContext") or {}
    totals = resources.pod_totals({**spec, "overhead": {}})  # overhead goes by itself: a runtime may size a VM by either
    config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(
            name=metadata["name"], uid=metadata["uid"], namespace=metadata["namespace"], attempt=attempt
        ),
        hostname=names.kernel_name(pod),
        log_directory=frame.log_directory(pod),
        labels=(metadata.get("labels") or {}) | _pod_labels(metadata),
        annotations=metadata.get("annotations") or {},
        linux=cri.LinuxPodSandboxConfig(
            cgroup_parent=frame.cgroup_parent,
            sysctls={one["name"]: one["value"] for one in security.get("sysctls") or []},
            overhead=_lump(spec.get("overhead") or {}),
            resources=cri.LinuxContainerResources(
                cpu_shares=totals["cpu"]["shares"],
                cpu_quota=totals["cpu"].get("quota", 0),
                cpu_period=totals["cpu"].get("period", 0),
                memory_limit_in_bytes=(totals.get("memory") or {}).get("limit", 0),
            ),
            security_context=cri.LinuxSandboxSecurityContext(
                namespace_options=_namespaces(spec),
                privileged=any((one.get("securityContext") or {}).get("privileged") for one in spec["containers"]),
            ),
        ),
    )
    config.dns_config.MergeFrom(names.resolvers(spec) or cri.DNSConfig())
    for container in spec["containers"]:
        for port in container.get("ports") or []:
            if port.get("hostPort") and not spec.get("hostNetwork"):
                config.port_mappings.append(
                    cri.PortMapping(
                        protocol=_PROTOCOLS[port.get("protocol", "TCP")],
                        container_port=port["containerPort"],
                        host_port=port["hostPort"],
                        host_ip=port.get("hostIP", ""),
                    )
                )
    return config


def container_config(
    pod: Mapping[str, Any], container: Mapping[str, Any], attempt: int, image: str, sources: Sources, frame: Frame
) -> Any:
    """Raises ConfigError for what the pod refers to and is not there."""
    metadata, spec, name = pod["metadata"], pod["spec"], container["name"]
    variables = environment(container, sources)
    os.makedirs(f"{frame.log_directory(pod)}/{name}", exist_ok=True)
    mounts, meanings = _mounts(pod, container, attempt, variables, frame)
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=name, attempt=attempt),
        image=cri.ImageSpec(image=image, user_specified_image=container["image"]),
        command=[expanded(word, variables) for word in container.get("command") or []],
        args=[expanded(word, variables) for word in container.get("args") or []],
        working_dir=container.get("workingDir", ""),
        envs=[cri.KeyValue(key=key, value=value.encode(errors="surrogateescape")) for key, value in variables.items()],
        mounts=mounts,
        labels=_pod_labels(metadata) | {CONTAINER_LABEL: name},
        annotations={
            "io.kubernetes.container.restartCount": str(attempt),
            "io.kubernetes.container.terminationMessagePath": container.get("terminationMessagePath") or "/dev/termination-log",
            "io.kubernetes.container.terminationMessagePolicy": container.get("terminationMessagePolicy") or "File",
            "io.kubernetes.pod.terminationGracePeriod": str(spec.get("terminationGracePeriodSeconds", 30)),
            MOUNTS_ANNOTATION: json.dumps(meanings, separators=(",", ":")),
        },
        log_path=f"{name}/{attempt}.log",
        stdin=bool(container.get("stdin")),
        stdin_once=bool(container.get("stdinOnce")),
        tty=bool(container.get("tty")),
        linux=cri.LinuxContainerConfig(
            resources=resources.linux_resources(container, resources.qos_class(spec), frame.node_memory),
            security_context=_security(spec, container),
        ),
    )


def _security(spec: Mapping[str, Any], container: Mapping[str, Any]) -> Any:
    of_pod, own = spec.get("securityContext") or {}, container.get("securityContext") or {}
    either = {**of_pod, **own}
    privileged = bool(own.get("privileged"))
    asked = either.get("seccompProfile")
    kind = asked["type"] if asked else "Unconfined" if privileged else "RuntimeDefault"
    seccomp = cri.SecurityProfile(profile_type=_PROFILES[kind], localhost_ref=(asked or {}).get("localhostProfile", ""))
    added = own.get("capabilities") or {}
    context = cri.LinuxContainerSecurityContext(
        capabilities=cri.Capability(add_capabilities=added.get("add"), drop_capabilities=added.get("drop")),
        privileged=privileged,
        namespace_options=_namespaces(spec),
        readonly_rootfs=bool(own.get("readOnlyRootFilesystem")),
        no_new_privs=own.get("allowPrivilegeEscalation") is False,
        supplemental_groups=[*(of_pod.get("supplementalGroups") or []), *([of_pod["fsGroup"]] if "fsGroup" in of_pod else [])],
        seccomp=seccomp,
    )
    if of_pod.get("supplementalGroupsPolicy") == "Strict":
        context.supplemental_groups_policy = cri.Strict
    if "appArmorProfile" in either:
        profile = either["appArmorProfile"]
        context.apparmor.profile_type = _PROFILES[profile["type"]]
        context.apparmor.localhost_ref = profile.get("localhostProfile", "")
    if "runAsUser" in either:
        context.run_as_user.value = either["runAsUser"]
    if "runAsGroup" in either:
        context.run_as_group.value = either["runAsGroup"]
    return context


def check_non_root(pod: Mapping[str, Any], container: Mapping[str, Any], image: Any) -> None:
    """runAsNonRoot against the user that will run. Raises ConfigError in Kubernetes' words."""
    either = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    if not either.get("runAsNonRoot"):
        return
    what = f"run container {container['name']} as non-root"
    if "runAsUser" in either:
        if either["runAsUser"] == 0:
            raise ConfigError(
                what=what, cause="container's runAsUser breaks non-root policy", remedy="set runAsUser to another uid"
            )
        return
    if image.username:
        raise ConfigError(
            what=what,
            cause=f"container has runAsNonRoot and image has non-numeric user ({image.username}), cannot verify user is non-root",
            remedy="set runAsUser to that user's uid",
        )
    if image.uid.value == 0:
        raise ConfigError(what=what, cause="container has runAsNonRoot and image will run as root", remedy="set runAsUser")


def _namespaces(spec: Mapping[str, Any]) -> Any:
    pid = cri.NODE if spec.get("hostPID") else cri.POD if spec.get("shareProcessNamespace") else cri.CONTAINER
    return cri.NamespaceOption(
        network=cri.NODE if spec.get("hostNetwork") else cri.POD, ipc=cri.NODE if spec.get("hostIPC") else cri.POD, pid=pid
    )


def _mounts(
    pod: Mapping[str, Any], container: Mapping[str, Any], attempt: int, variables: Mapping[str, str], frame: Frame
) -> tuple[list[Any], list[dict[str, Any]]]:
    volumes = {one["name"]: one for one in pod["spec"].get("volumes") or []}
    made, meanings = [], []
    for mount in container.get("volumeMounts") or []:
        volume = volumes[mount["name"]]
        source = frame.volumes.path(volume)
        below = expanded(mount["subPathExpr"], variables) if mount.get("subPathExpr") else mount.get("subPath", "")
        if below:
            source = _sub_path(source, below, mount["name"])
        kind = kind_of(volume)
        propagation = {"HostToContainer": cri.PROPAGATION_HOST_TO_CONTAINER, "Bidirectional": cri.PROPAGATION_BIDIRECTIONAL}
        made.append(
            cri.Mount(
                container_path=mount["mountPath"],
                host_path=source,
                readonly=bool(mount.get("readOnly")),
                recursive_read_only=mount.get("recursiveReadOnly", "Disabled") != "Disabled",
                propagation=propagation.get(mount.get("mountPropagation", ""), cri.PROPAGATION_PRIVATE),
            )
        )
        meaning: dict[str, Any] = {"destination": mount["mountPath"], "type": kind, "name": mount["name"]}
        if kind == "emptyDir":
            options = volume.get("emptyDir") or {}
            meaning |= {"medium": options.get("medium", ""), "sub_path": below}
            meaning |= {"size_bytes": int(resources.quantity(options["sizeLimit"]))} if options.get("sizeLimit") else {}
        meanings.append(meaning)
    taken = {mount.container_path for mount in made}
    hosts = f"{frame.volumes.directory}/etc-hosts"
    if os.path.exists(hosts) and "/etc/hosts" not in taken:
        made.append(cri.Mount(container_path="/etc/hosts", host_path=hosts))
        meanings.append({"destination": "/etc/hosts", "type": "file", "name": "hosts"})
    target = container.get("terminationMessagePath") or "/dev/termination-log"
    made.append(
        cri.Mount(container_path=target, host_path=termination_file(frame.volumes, container["name"], attempt, create=True))
    )
    meanings.append({"destination": target, "type": "file", "name": "termination-log"})
    return made, meanings


def log_file(frame: Frame, pod: Mapping[str, Any], container: str, attempt: int) -> str:
    return f"{frame.log_directory(pod)}/{container}/{attempt}.log"


def termination_file(volumes: PodVolumes, container: str, attempt: int, *, create: bool = False) -> str:
    path = f"{volumes.directory}/containers/{container}/{attempt}"
    if create:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        os.fchmod(fd, 0o666)
        os.close(fd)
    return path


def _sub_path(volume: str, below: str, name: str) -> str:
    """The host path of `below` inside a volume, made as a directory if missing, every link resolved beneath the volume."""
    what = f"mount subPath {below} of volume {name}"
    if below.startswith("/") or ".." in below.split("/"):
        raise ConfigError(what=what, cause="it leads out of the volume")
    try:
        with owned(paths.open_root(volume)) as root:
            try:
                fd = paths.openat2(root, below, os.O_PATH, resolve=BENEATH)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                os.close(paths.make_directories_in(root, below))
                fd = paths.openat2(root, below, os.O_PATH, resolve=BENEATH)
            with owned(fd):
                return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        raise ConfigError(what=what, cause=str(error)) from error


def _pod_labels(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {
        "io.kubernetes.pod.name": metadata["name"],
        "io.kubernetes.pod.namespace": metadata["namespace"],
        UID_LABEL: metadata["uid"],
    }


def _lump(wanted: Mapping[str, Any]) -> Any:
    made = cri.LinuxContainerResources()
    if "memory" in wanted:
        made.memory_limit_in_bytes = int(resources.quantity(wanted["memory"]))
    if "cpu" in wanted:
        made.cpu_shares = resources.shares(resources.quantity(wanted["cpu"]))
    return made
