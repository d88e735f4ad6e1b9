"""A CRI ContainerConfig, its sandbox and its image become an OCI runtime specification (config.md, config-linux.md).

Pure: nothing here touches the host but `device_nodes`, which reads what a privileged container is given. What CRI can ask for and
nacre does not do is refused here, before anything is made.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any

from nacre.images import Image, User
from nacre.oci import stock
from nacre.oci.errors import Invalid, Unsupported
from nacre.wire import cri_pb2 as cri

DEFAULT_CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
)  # fmt: skip
ALL_CAPABILITIES = tuple(
    "CAP_" + name
    for name in str.split(  # words are read more easily than forty quoted strings
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST "
        "NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE "
        "SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG "
        "WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    )
)
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROPAGATION = {
    cri.PROPAGATION_PRIVATE: "rprivate",
    cri.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    cri.PROPAGATION_BIDIRECTIONAL: "rshared",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a container finds made: its pod's directory, namespaces to join, cgroup, and its own user."""

    sandbox_id: str
    container_id: str
    directory: str  # STATE/pods/SANDBOX
    namespaces: dict[str, str]  # OCI kind → path; absent: the host's
    cgroups_path: str
    user: User
    host_ipc: bool = False


def build(sandbox: Any, container: Any, image: Image, around: Surroundings) -> dict[str, Any]:
    """The config.json document. Raises Unsupported and Invalid, each naming the field of the pod."""
    security = container.linux.security_context
    privileged = security.privileged
    capabilities = effective_capabilities(security)
    linux: dict[str, Any] = {
        "namespaces": _namespaces(around),
        "resources": resources(container.linux.resources) | {"devices": _device_rules(container, privileged=privileged)},
        "cgroupsPath": around.cgroups_path,
        "devices": device_nodes(container, privileged=privileged),
    }
    if not privileged:
        linux["maskedPaths"] = list(security.masked_paths or stock.MASKED)
        linux["readonlyPaths"] = list(security.readonly_paths or stock.READONLY)
    seccomp = _seccomp(security, capabilities)
    if seccomp:
        linux["seccomp"] = seccomp
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        **({"hostname": sandbox.hostname} if sandbox.hostname and "uts" in around.namespaces else {}),  # else it is the host's
        "process": _process(container, image, around.user, capabilities),
        "mounts": _mounts(container, around, privileged=privileged),
        "linux": linux,
        "annotations": _annotations(sandbox, container, around),
    }


def exec_process(base: dict[str, Any], command: list[str], *, tty: bool) -> dict[str, Any]:
    """The container's own `process` with another command, for ExecSync and Exec."""
    return {key: value for key, value in base.items() if key != "oomScoreAdj"} | {"args": command, "terminal": tty}


def effective_capabilities(security: Any) -> tuple[str, ...]:
    """What a container may do: everything if privileged, else the default set with `add` and `drop` applied, drops of ALL first."""
    if security.privileged:
        return ALL_CAPABILITIES
    add, drop = (
        [_capability(name) for name in names]
        for names in (security.capabilities.add_capabilities, security.capabilities.drop_capabilities)
    )
    held = set(ALL_CAPABILITIES if "CAP_ALL" in add else () if "CAP_ALL" in drop else DEFAULT_CAPABILITIES)
    held |= {name for name in add if name != "CAP_ALL"}
    held -= {name for name in drop if name != "CAP_ALL"}
    return tuple(name for name in ALL_CAPABILITIES if name in held)


def resources(wanted: Any) -> dict[str, Any]:
    """LinuxContainerResources as OCI linux.resources; zero means unset, as in protobuf."""
    cpu = {
        "shares": wanted.cpu_shares,
        "quota": wanted.cpu_quota,
        "period": wanted.cpu_period,
        "cpus": wanted.cpuset_cpus,
        "mems": wanted.cpuset_mems,
    }
    memory = {"limit": wanted.memory_limit_in_bytes, "swap": wanted.memory_swap_limit_in_bytes}
    document: dict[str, Any] = {}
    for key, table in (("cpu", cpu), ("memory", memory)):
        kept = {name: value for name, value in table.items() if value}
        if kept:
            document[key] = kept
    if wanted.hugepage_limits:
        document["hugepageLimits"] = [{"pageSize": one.page_size, "limit": one.limit} for one in wanted.hugepage_limits]
    if wanted.unified:
        document["unified"] = dict(wanted.unified)
    return document


def _process(container: Any, image: Image, user: User, capabilities: tuple[str, ...]) -> dict[str, Any]:
    security = container.linux.security_context
    defaults = image.config.get("config") or {}
    command = list(container.command) or list(defaults.get("Entrypoint") or ())
    arguments = list(container.args) or ([] if container.command else list(defaults.get("Cmd") or ()))
    if not command + arguments:
        raise Invalid(
            what=f"create container {container.metadata.name}",
            cause=f"neither the pod nor image {image.name} names a command",
            remedy="set `command` in the pod",
        )
    environment = {pair.partition("=")[0]: pair for pair in (DEFAULT_PATH, *(defaults.get("Env") or ()))}
    environment |= {
        pair.key: f"{pair.key}={os.fsdecode(pair.value) if isinstance(pair.value, bytes) else pair.value}"
        for pair in container.envs
    }
    if container.tty:
        environment.setdefault("TERM", "TERM=xterm")
    sets = list(capabilities)
    ambient = [_capability(name) for name in security.capabilities.add_ambient_capabilities]
    process: dict[str, Any] = {
        "terminal": container.tty,
        "user": {
            "uid": user.uid,
            "gid": user.gid,
            "additionalGids": sorted({*user.groups, *security.supplemental_groups, user.gid}),
        },
        "args": command + arguments,
        "env": list(environment.values()),
        "cwd": container.working_dir or defaults.get("WorkingDir") or "/",
        "capabilities": {"bounding": sets, "effective": sets, "permitted": sets, "inheritable": ambient, "ambient": ambient},
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": container.linux.resources.oom_score_adj,
    }
    profile = _apparmor(security)
    if profile:
        process["apparmorProfile"] = profile
    if user.uid and not ambient:  # an unprivileged user's execve would lose them anyway: say so in the document
        process["capabilities"] |= {"effective": [], "permitted": []}
    return process


def _namespaces(around: Surroundings) -> list[dict[str, str]]:
    listed: list[dict[str, str]] = [{"type": "mount"}]
    for kind in ("network", "ipc", "uts", "pid"):
        path = around.namespaces.get(kind)
        if path is not None:
            listed.append({"type": kind, "path": path} if path else {"type": kind})
    listed.append({"type": "cgroup"})
    return listed


def _mounts(container: Any, around: Surroundings, *, privileged: bool) -> list[dict[str, Any]]:
    asked = {os.path.normpath(mount.container_path) for mount in container.mounts}
    made = stock.mounts(access="rw" if privileged else "ro")
    shm = "/dev/shm" if around.host_ipc else f"{around.directory}/shm"
    files = (("/etc/resolv.conf", "resolv.conf"), ("/etc/hostname", "hostname"), ("/etc/hosts", "hosts"))
    own = [("/dev/shm", shm)] + [
        (target, f"{around.directory}/{name}") for target, name in files if os.path.exists(f"{around.directory}/{name}")
    ]
    made += [
        {"destination": target, "type": "bind", "source": source, "options": ["rbind", "rprivate", "rw"]}
        for target, source in own
        if target not in asked
    ]
    made = [mount for mount in made if mount["destination"] not in asked]
    return made + [_asked_mount(mount) for mount in container.mounts]


def _asked_mount(mount: Any) -> dict[str, Any]:
    for name in ("uidMappings", "gidMappings"):
        if getattr(mount, name):
            raise Unsupported(
                what=f"mount {mount.container_path}", cause="idmapped mounts are not offered yet", remedy="leave hostUsers out"
            )
    if mount.image.image:
        raise Unsupported(
            what=f"mount {mount.container_path}", cause="image volumes are not offered yet", remedy="use another volume type"
        )
    options = ["rbind", _PROPAGATION[mount.propagation], "ro" if mount.readonly else "rw"]
    if mount.recursive_read_only:
        options.append("rro")
    return {"destination": mount.container_path, "type": "bind", "source": mount.host_path, "options": options}


def device_nodes(container: Any, *, privileged: bool) -> list[dict[str, Any]]:
    """Devices to make beyond the six that every container has: the host's for a privileged one, else those asked for."""
    nodes = []
    if privileged:
        nodes += [_node(f"/dev/{name}", f"/dev/{name}") for name in sorted(os.listdir("/dev")) if _is_device(f"/dev/{name}")]
    for device in container.devices:
        if not _is_device(device.host_path):
            raise Invalid(
                what=f"give device {device.host_path}", cause="it is no device of this host", remedy="mend the pod's devices"
            )
        nodes.append(_node(device.host_path, device.container_path or device.host_path))
    return [node for node in nodes if node["path"] not in {f"/dev/{name}" for name, _major, _minor in stock.DEVICES}]


def _is_device(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _node(source: str, target: str) -> dict[str, Any]:
    found = os.stat(source)
    return {
        "path": target,
        "type": "b" if stat.S_ISBLK(found.st_mode) else "c",
        "major": os.major(found.st_rdev),
        "minor": os.minor(found.st_rdev),
        "fileMode": stat.S_IMODE(found.st_mode),
        "uid": found.st_uid,
        "gid": found.st_gid,
    }


def _device_rules(container: Any, *, privileged: bool) -> list[dict[str, Any]]:
    if privileged:
        return [{"allow": True, "access": "rwm"}]
    rules = stock.device_rules()
    for device in container.devices:
        node = _node(device.host_path, device.container_path or device.host_path)
        rules.append(
            {
                "allow": True,
                "type": node["type"],
                "major": node["major"],
                "minor": node["minor"],
                "access": device.permissions or "rwm",
            }
        )
    return rules


def _seccomp(security: Any, capabilities: tuple[str, ...]) -> dict[str, Any] | None:
    profile = security.seccomp
    if not security.HasField("seccomp"):
        old = security.seccomp_profile_path  # before 1.19: "", "runtime/default", "unconfined", "localhost/PATH"
        if old not in ("", "unconfined", "runtime/default", "docker/default"):
            raise Unsupported(
                what="load a seccomp profile", cause=f"{old} is not offered", remedy="use RuntimeDefault or Unconfined"
            )
        from nacre.oci import seccomp_default

        return dict(seccomp_default.profile(capabilities)) if old.endswith("default") and not security.privileged else None
    if security.privileged or profile.profile_type == cri.SecurityProfile.Unconfined:
        return None
    if profile.profile_type == cri.SecurityProfile.Localhost:
        return _localhost_profile(profile.localhost_ref)
    from nacre.oci import seccomp_default

    return dict(seccomp_default.profile(capabilities))


def _apparmor(security: Any) -> str:
    """A profile that the pod names; nacre brings none of its own, so RuntimeDefault is no confinement by AppArmor."""
    profile = security.apparmor
    named = ""
    if security.HasField("apparmor"):
        named = profile.localhost_ref if profile.profile_type == cri.SecurityProfile.Localhost else ""
    elif security.apparmor_profile.startswith("localhost/"):  # before 1.30
        named = security.apparmor_profile.removeprefix("localhost/")
    if named and not os.path.isdir("/sys/kernel/security/apparmor"):
        raise Unsupported(
            what=f"confine the container by AppArmor profile {named}",
            cause="/sys/kernel/security/apparmor is not there: this kernel runs without AppArmor",
            remedy="take the profile out of the pod, or boot with apparmor=1 security=apparmor",
        )
    return named if not security.privileged else ""


def _localhost_profile(path: str) -> dict[str, Any]:
    import msgspec

    try:
        with open(path, "rb") as file:
            document: dict[str, Any] = msgspec.json.decode(file.read(), type=dict)
    except OSError as error:
        raise Invalid(
            what=f"load seccomp profile {path}", cause=str(error.strerror), remedy="put the profile there on this node"
        ) from error
    except msgspec.DecodeError as error:
        raise Invalid(what=f"load seccomp profile {path}", cause=f"it is no JSON object: {error}") from error
    return document


def _annotations(sandbox: Any, container: Any, around: Surroundings) -> dict[str, str]:
    """What other runtimes look for (Kata above all), beside the pod's own annotations and the container's."""
    named = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": container.metadata.name,
        "io.kubernetes.cri.image-name": container.image.user_specified_image or container.image.image,
        "io.kubernetes.cri.sandbox-id": around.sandbox_id,
        "io.kubernetes.cri.sandbox-name": sandbox.metadata.name,
        "io.kubernetes.cri.sandbox-namespace": sandbox.metadata.namespace,
        "io.kubernetes.cri.sandbox-uid": sandbox.metadata.uid,
    }
    return dict(container.annotations) | named


_IPC_SYSCTLS = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")


def check_sysctls(sysctls: Any, namespaces: Any) -> None:
    """Only what belongs to a namespace of the pod's own: anything else would be the host's. Raises Invalid."""
    for key in sysctls:
        dotted = key.replace("/", ".")
        kind = "network" if dotted.startswith("net.") else "ipc" if dotted.startswith(_IPC_SYSCTLS) else ""
        if ".." in key or not kind or kind not in namespaces:
            cause = f"it is not in the pod's {kind} namespace, which is the host's" if kind else "it is the whole host's"
            raise Invalid(what=f"set sysctl {key}", cause=cause, remedy="take it out of the pod's securityContext")


def _capability(name: str) -> str:
    upper = name.upper()
    return upper if upper.startswith("CAP_") else "CAP_" + upper
