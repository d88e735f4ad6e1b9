"""The throw-away container: runs once in a template or a pool member, so that code is translated and modules are loaded before a pod comes.

It sees the guest's own root and carries nothing of any pod.
"""

from __future__ import annotations

import os
from typing import Any

from nacre.agent import boot
from nacre.agent import protocol as p
from nacre.oci import stock

NAME = "nacre-warm"
_BOUND = f"{boot.MODULES}/order"  # a file that every guest has, mounted as a pod's own files are
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETGID", "CAP_SETUID", "CAP_KILL"]
_LOADERS = ("/usr/lib64/ld-linux-x86-64.so.2", "/usr/lib/ld-linux-aarch64.so.1")


def program() -> list[str]:
    """Something that the guest has and that ends at once: the dynamic loader, asked for its version."""
    return [next((path for path in _LOADERS if os.path.exists(path)), _LOADERS[0]), "--version"]


def request() -> p.Create:
    """A container like a pod's: every namespace that one gets, its mounts, capabilities, limits."""
    config: dict[str, Any] = {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "args": program(),
            "env": ["PATH=/usr/bin"],
            "cwd": "/",
            "user": {"uid": 65534, "gid": 65534},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": True,
            "oomScoreAdj": 0,
        },
        "mounts": [
            *stock.mounts(),
            {"destination": "/dev/shm", "type": "bind", "source": "/run/nacre/shm", "options": ["rbind", "rprivate", "rw"]},
            {"destination": _BOUND, "type": "bind", "source": _BOUND, "options": ["rbind", "rprivate", "rw"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "pid", "cgroup")],
            "resources": {"memory": {"limit": 64 << 20}, "cpu": {"shares": 512}, "devices": stock.device_rules()},
            "maskedPaths": list(stock.MASKED),
            "readonlyPaths": list(stock.READONLY),
        },
    }
    return p.Create(container=NAME, config=config, root=p.Root(drive="", uuid=""))
