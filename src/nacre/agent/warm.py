"""The throw-away container: runs once in a template or a pool member, so that code is translated and modules are loaded before a pod comes.

It carries nothing of any pod: its files are such as every guest has.
"""

from __future__ import annotations

import os
from typing import Any

from nacre.agent import boot
from nacre.agent import protocol as p
from nacre.oci import stock

NAME = "nacre-warm"
_PROGRAM = "/program"
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETGID", "CAP_SETUID", "CAP_KILL"]
_LOADERS = ("/usr/lib64/ld-linux-x86-64.so.2", "/usr/lib/ld-linux-aarch64.so.1")


def _loader() -> str:
    """Something that the guest has, needs no other file and ends at once when it is asked for its version."""
    return next((path for path in _LOADERS if os.path.exists(path)), _LOADERS[0])


def request(root: p.Root) -> p.Create:
    """A container like a pod's: every namespace that one gets, its mounts, capabilities, limits."""
    config: dict[str, Any] = {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": False},
        "process": {
            "args": [_PROGRAM, "--version"],
            "env": ["PATH=/usr/bin"],
            "cwd": "/",
            "user": {"uid": 65534, "gid": 65534},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": True,
            "oomScoreAdj": 0,
        },
        "mounts": [
            *stock.mounts(),
            _bind("/dev/shm", f"{boot.RUN}/shm"),
            *(_bind(target, boot.MODULES + "/order") for target in ("/etc/resolv.conf", "/etc/hostname", "/etc/hosts")),
            _bind(_PROGRAM, _loader()),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "pid", "cgroup")],
            "resources": {"memory": {"limit": 64 << 20}, "cpu": {"shares": 512}, "devices": stock.device_rules()},
            "maskedPaths": list(stock.MASKED),
            "readonlyPaths": list(stock.READONLY),
        },
    }
    return p.Create(container=NAME, config=config, root=root)


def _bind(target: str, source: str) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": source, "options": ["rbind", "rprivate", "rw"]}
