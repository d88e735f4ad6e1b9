"""Requests and limits: QoS classes, what the kernel is told, the pod's own cgroup. Pure but for `PodCgroup`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from nacre.linux import cgroups
from nacre.linux.cgroup_names import child, name_in
from nacre.linux.cgroup_systemd import group
from nacre.oci.errors import Invalid
from nacre.wire import cri_pb2 as cri

_SUFFIXES: dict[str, Fraction | int] = {
    "": 1,
    "m": Fraction(1, 1000),
    "u": Fraction(1, 10**6),
    "n": Fraction(1, 10**9),
    "k": 10**3,
}
_SUFFIXES |= {letter: 10 ** (3 * power) for power, letter in enumerate("MGTPE", 2)}
_SUFFIXES |= {f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("KMGTPE", 1)}
_QUANTITY = re.compile(r"([+-]?[0-9.]+)(?:[eE]([+-]?[0-9]+)|([a-zA-Z]{0,2}))")
VM_HANDLER = "kata"
CPU_PERIOD_US = 100_000
MIN_QUOTA_US = 1_000
MIN_SHARES, MAX_SHARES = 2, 262_144


def quantity(text: Any) -> Fraction:
    """A Kubernetes quantity ("100m", "1.5Gi", "2e3") as a number. Raises Invalid."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None or (match[3] or "") not in _SUFFIXES:
        raise Invalid(what="read a quantity", cause=f"{text!r} is none")
    return Fraction(match[1]) * (Fraction(10) ** int(match[2]) if match[2] else Fraction(_SUFFIXES[match[3] or ""]))


def qos_class(spec: dict[str, Any]) -> str:
    """Guaranteed, Burstable or BestEffort, by the containers' cpu and memory."""
    containers = [*(spec.get("initContainers") or []), *spec["containers"]]
    asked = [one.get("resources") or {} for one in containers]
    if not any(
        (one.get("requests") or {}).keys() & {"cpu", "memory"} or (one.get("limits") or {}).keys() & {"cpu", "memory"}
        for one in asked
    ):
        return "BestEffort"
    for one in asked:
        limits, requests = one.get("limits") or {}, one.get("requests") or {}
        for name in ("cpu", "memory"):
            if name not in limits or quantity(requests.get(name, limits[name])) != quantity(limits[name]):
                return "Burstable"
    return "Guaranteed"


def linux_resources(container: Mapping[str, Any], qos: str, node_memory: int) -> Any:
    """LinuxContainerResources of one container."""
    asked = container.get("resources") or {}
    limits, requests = asked.get("limits") or {}, asked.get("requests") or {}
    cpu_request = requests.get("cpu", limits.get("cpu", 0))
    made = cri.LinuxContainerResources(
        cpu_period=CPU_PERIOD_US,
        cpu_shares=shares(quantity(cpu_request)),
        oom_score_adj=oom_score(qos, requests, limits, node_memory),
    )
    if "cpu" in limits:
        made.cpu_quota = quota(quantity(limits["cpu"]))
    if "memory" in limits:
        made.memory_limit_in_bytes = int(quantity(limits["memory"]))
    return made


def shares(cpus: Fraction) -> int:
    return max(MIN_SHARES, min(MAX_SHARES, int(cpus * 1024)))


def quota(cpus: Fraction) -> int:
    """Microseconds of CPU per CPU_PERIOD_US."""
    return max(MIN_QUOTA_US, int(cpus * CPU_PERIOD_US))


def oom_score(qos: str, requests: dict[str, Any], limits: dict[str, Any], node_memory: int) -> int:
    """Who goes first when the node runs out: BestEffort 1000, Guaranteed -997, between them by the share of memory asked for."""
    if qos == "Guaranteed":
        return -997
    if qos == "BestEffort":
        return 1000
    memory = quantity(requests.get("memory", limits.get("memory", 0)))
    return max(3, min(999, 1000 - int(1000 * memory / max(1, node_memory))))


def is_unweighed_vm(spec: dict[str, Any], handler: str) -> bool:
    """Whether the pod runs in a VM whose own memory nobody has counted: its RuntimeClass has no overhead."""
    return handler == VM_HANDLER and "memory" not in (spec.get("overhead") or {})


def pod_totals(spec: dict[str, Any], handler: str = "") -> dict[str, Any]:
    """OCI linux.resources of a whole pod: sums over the containers, at least each init container, overhead on top.

    A limit is set only if every container has one, as otherwise the pod has none. An unweighed VM has no limit of memory as a whole:
    the containers' would leave its kernel no room; the size of its guest bounds it.
    """
    containers, first = spec["containers"], spec.get("initContainers") or []
    overhead = spec.get("overhead") or {}

    def total(name: str, kind: str) -> Fraction | None:
        values = [((one.get("resources") or {}).get(kind) or {}).get(name) for one in containers]
        if kind == "limits" and any(value is None for value in values):
            return None
        summed = sum((quantity(value) for value in values if value is not None), Fraction(0))
        largest = max(
            (quantity(((one.get("resources") or {}).get(kind) or {}).get(name, 0)) for one in first), default=Fraction(0)
        )
        return max(summed, largest) + quantity(overhead.get(name, 0))

    cpu: dict[str, int] = {"shares": shares(total("cpu", "requests") or Fraction(0))}
    cpu_limit = total("cpu", "limits")
    memory_limit = None if is_unweighed_vm(spec, handler) else total("memory", "limits")
    if cpu_limit is not None:
        cpu |= {"quota": quota(cpu_limit), "period": CPU_PERIOD_US}
    return {"cpu": cpu} | ({"memory": {"limit": int(memory_limit)}} if memory_limit is not None else {})


class PodCgroup:
    """ROOT/kubepods/[burstable/|besteffort/]podUID, slices if ROOT is one: made before the sandbox, removed after it."""

    def __init__(self, layout: cgroups.Layout, root: str, uid: str, qos: str) -> None:
        self.path = child(_level(root, "" if qos == "Guaranteed" else qos.lower()), f"pod{uid}")
        self._cgroup = group(layout, self.path)

    def make(self, resources: dict[str, Any]) -> None:
        """Raises CgroupMissing, LimitRefused."""
        self._cgroup.create()
        self._cgroup.apply(resources)

    def remove(self) -> None:
        self._cgroup.remove()


LEVELS = ("", "burstable", "besteffort")


def _level(root: str, name: str) -> str:
    pods = child(root, "kubepods")
    return child(pods, name) if name else pods


def make_levels(layout: cgroups.Layout, root: str) -> None:
    """The groups that pods' groups lie in, by QoS class."""
    for level in LEVELS:
        group(layout, _level(root, level)).create()


def remove_pod_cgroups(layout: cgroups.Layout, root: str, living: set[str]) -> None:
    """Empty groups of pods that are not among the `living`; one with processes in it belongs to someone and stays."""
    for level in LEVELS:
        parent = _level(root, level)
        places = (directory for _hierarchy, directory in cgroups.Cgroup(layout, parent).directories() if os.path.isdir(directory))
        names = {name_in(parent, entry) for directory in places for entry in os.listdir(directory)}
        for name in names:
            pod = group(layout, child(parent, name))
            if name.startswith("pod") and name[3:] not in living and not pod.pids():
                pod.remove()


def node_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
