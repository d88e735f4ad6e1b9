"""What `spec` writes and what `features` prints (features.md): documents made on demand, off every hot path."""

from __future__ import annotations

import os
from typing import Any

from nacre.linux import capabilities, cgroup_layout, seccomp, seccomp_compiler
from nacre.oci import spec as oci_spec

_MOUNTS = (
    ("/proc", "proc", "proc", ()),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("/sys/fs/cgroup", "cgroup", "cgroup", ("nosuid", "noexec", "nodev", "relatime", "ro")),
)
_MASKED = ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")


def spec(*, rootless: bool) -> dict[str, Any]:
    """A config.json to begin with: a shell in namespaces of its own, read-only root."""
    kept = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    kinds = ["pid", "network", "ipc", "uts", "mount"]
    if cgroup_layout.discover().mode == "v2":
        kinds.append("cgroup")
    mounts = [
        {"destination": destination, "type": kind, "source": source, **({"options": list(options)} if options else {})}
        for destination, kind, source, options in _MOUNTS
    ]
    linux: dict[str, Any] = {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [{"type": kind} for kind in kinds],
        "maskedPaths": [f"/proc/{name}" for name in _MASKED] + ["/sys/firmware"],
        "readonlyPaths": [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")],
    }
    if rootless:
        linux["namespaces"] = [{"type": kind} for kind in (*kinds[:1], *kinds[2:], "user")]
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
        del linux["resources"]
        mounts[2]["options"] = [word for word in mounts[2]["options"] if not word.startswith("gid=")]  # that group is not mapped
        mounts[5] = {
            "destination": "/sys",
            "type": "none",
            "source": "/sys",
            "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
        }
    return {
        "ociVersion": oci_spec.VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {kind: list(kept) for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "nacre",
        "mounts": mounts,
        "linux": linux,
    }


def _remarks() -> dict[str, str]:
    """By the names that engines know from other runtimes."""
    library = seccomp_compiler.version()
    return {"org.opencontainers.runc.checkpoint.enabled": "true"} | (
        {"io.github.seccomp.libseccomp.version": library} if library else {}
    )


def features() -> dict[str, Any]:
    """What this runtime does, for engines that ask before they use it."""
    from nacre.runc import mount_options, plan

    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": oci_spec.VERSION,
        "hooks": list(oci_spec.HOOK_POINTS),
        "mountOptions": mount_options.known(),
        "linux": {
            "namespaces": sorted(oci_spec.NAMESPACES),
            "capabilities": list(capabilities.NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {
                "enabled": seccomp_compiler.available(),
                "actions": seccomp_compiler.known_actions(),
                "operators": seccomp_compiler.known_operators(),
                "archs": seccomp_compiler.known_architectures(),
                "knownFlags": sorted(seccomp.FLAGS),
                "supportedFlags": sorted(seccomp.FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "memoryPolicy": {"modes": list(plan.MEMORY_POLICIES), "flags": list(plan.MEMORY_POLICY_FLAGS)},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": _remarks(),
        "potentiallyUnsafeConfigAnnotations": ["org.systemd.property.", "org.criu.config"],
    }
