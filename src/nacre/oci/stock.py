"""What every container of a pod has in its document, whatever the pod asks for: written by `cri`, known beforehand to who makes containers ahead.

The lists are made anew by each call: their caller may change them.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

# name, major, minor
DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
MASKED = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def mounts(*, access: str = "ro") -> list[dict[str, Any]]:
    """`mounts` up to the pod's own; `access` to /sys is "rw" for who is privileged."""
    guarded = ["nosuid", "noexec", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": guarded},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": guarded},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*guarded, access]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*guarded, "relatime", access]},
    ]  # fmt: skip


def device_rules() -> list[dict[str, Any]]:
    """`linux.resources.devices`: the nodes above and terminals may be used, any node may be made."""
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    rules += [{"allow": True, "type": kind, "access": "m"} for kind in ("c", "b")]
    rules += [{"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"} for _name, major, minor in DEVICES]
    rules += [{"allow": True, "type": "c", "major": 5, "minor": minor, "access": "rwm"} for minor in (1, 2)]
    rules.append({"allow": True, "type": "c", "major": 136, "access": "rwm"})
    return rules
