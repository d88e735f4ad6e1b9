"""The throw-away container: runs once in a template or a pool member, so that code is translated and modules are loaded before a pod comes.

It sees the guest's own root and carries nothing of any pod.
"""

from __future__ import annotations

import os
from typing import Any

from nacre.agent import protocol as p

NAME = "nacre-warm"
_LOADERS = ("/usr/lib64/ld-linux-x86-64.so.2", "/usr/lib/ld-linux-aarch64.so.1")


def program() -> list[str]:
    """Something that the guest has and that ends at once: the dynamic loader, asked for its version."""
    return [next((path for path in _LOADERS if os.path.exists(path)), _LOADERS[0]), "--version"]


def request() -> p.Create:
    """A container like a pod's: every namespace that one gets, its mounts, capabilities, limits."""
    guarded = ["nosuid", "noexec", "nodev"]
    config: dict[str, Any] = {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "args": program(),
            "env": ["PATH=/usr/bin"],
            "cwd": "/",
            "user": {"uid": 65534, "gid": 65534},
            "capabilities": {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "permitted")},
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": guarded},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": guarded},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*guarded, "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*guarded, "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "pid", "cgroup")],
            "resources": {
                "memory": {"limit": 64 << 20},
                "cpu": {"shares": 512},
                "devices": [{"allow": False, "access": "rwm"}],
            },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
        },
    }
    return p.Create(container=NAME, config=config, root=p.Root(drive="", uuid=""))
