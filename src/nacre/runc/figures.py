"""What a container uses, in the shape that `runc events` prints: the same keys and units on cgroup v1 and v2; what nobody counts is left out.

Beside `Cgroup.stats`, which has the few figures that a node asks for all the time. Times in ns, sizes in bytes.
"""

from __future__ import annotations

import os

from nacre.linux import cgroup_files as files
from nacre.linux import cgroups

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

    Tree = dict[str, Any]

_NO_LIMIT = (1 << 64) - 1  # how engines are told of v2's "max"
_V1_SIZES = {"usage": "usage_in_bytes", "max": "max_usage_in_bytes"}
_V1_BLKIO = {"io_service_bytes": "ioServiceBytesRecursive", "io_serviced": "ioServicedRecursive"}
_V2_IO = {"r": "Read", "w": "Write", "d": "Discard"}


def figures(cgroup: cgroups.Cgroup) -> Tree:
    """The `data` of a stats event."""
    return {
        "cpu": _cpu(cgroup),
        "cpuset": _cpuset(_Files(cgroup, "cpuset")),
        "memory": _memory(_Files(cgroup, "memory")),
        "pids": _pids(_Files(cgroup, "pids")),
        "blkio": _blkio(_Files(cgroup, "blkio")),
        "hugetlb": _hugetlb(_Files(cgroup, "hugetlb")),
        "intel_rdt": {},
        "network_interfaces": None,
    }


class _Files:
    """The cgroup's files in the hierarchy of one controller; without one they all read as empty."""

    def __init__(self, cgroup: cgroups.Cgroup, controller: str) -> None:
        hierarchy = cgroup.layout.find(controller)
        if hierarchy is None and controller == "cpu":
            hierarchy = cgroup.layout.unified  # counts time without any controller
        self.modern = hierarchy is not None and hierarchy.version == 2
        self.directory = cgroup.layout.directory(hierarchy, cgroup.path) if hierarchy else ""

    def text(self, name: str) -> str:
        return files.read(self.directory, name) if self.directory else ""

    def table(self, name: str) -> dict[str, int]:
        return files.table(self.text(name))

    def number(self, name: str) -> int:
        text = self.text(name).strip()
        return _NO_LIMIT if text == "max" else files.number(text)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.directory)) if self.directory else []
        except FileNotFoundError:
            return []


def _used(**counted: int) -> dict[str, int]:
    return {key: value for key, value in counted.items() if value}


def _cpu(cgroup: cgroups.Cgroup) -> Tree:
    time, account = _Files(cgroup, "cpu"), _Files(cgroup, "cpuacct")
    table = time.table("cpu.stat")
    throttled = table.get("throttled_time", table.get("throttled_usec", 0) * 1000)
    throttling = _used(periods=table.get("nr_periods", 0), throttledPeriods=table.get("nr_throttled", 0), throttledTime=throttled)
    if account.directory and not account.modern:
        return {"usage": _accounted(account), "throttling": throttling}
    usage = {"total": "usage_usec", "kernel": "system_usec", "user": "user_usec"}
    return {"usage": {key: table.get(name, 0) * 1000 for key, name in usage.items()}, "throttling": throttling}


def _accounted(account: _Files) -> Tree:
    """cpuacct: its total is exact, `user` and `system` are in clock ticks, and each CPU has its own."""
    tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    table = account.table("cpuacct.stat")
    rows = [line.split() for line in account.text("cpuacct.usage_all").splitlines()[1:]]  # "cpu user system"
    return {
        "total": account.number("cpuacct.usage"),
        "percpu": [int(word) for word in account.text("cpuacct.usage_percpu").split()],
        "percpu_kernel": [int(row[2]) for row in rows],
        "percpu_user": [int(row[1]) for row in rows],
        "kernel": table.get("system", 0) * tick_ns,
        "user": table.get("user", 0) * tick_ns,
    }


def _cpuset(place: _Files) -> Tree:
    if not place.directory:
        return {}
    found: Tree = {}
    for kind in ("cpus", "mems"):
        text = place.text(f"cpuset.{kind}.effective" if place.modern else f"cpuset.{kind}")
        found[kind] = [number for part in text.strip().split(",") if part for number in _range(part)]
    if not place.modern:
        flags = ("cpu_exclusive", "mem_hardwall", "mem_exclusive", "memory_migrate", "memory_spread_page", "memory_spread_slab")
        for name in (*flags, "memory_pressure", "sched_load_balance", "sched_relax_domain_level"):
            found[name] = place.number(f"cpuset.{name}")
    return found


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _memory(place: _Files) -> Tree:
    if not place.directory:
        return {}
    raw = place.table("memory.stat")
    if not place.modern:
        found = {
            "usage": _v1_memory(place, "memory"),
            "swap": _v1_memory(place, "memory.memsw"),
            "kernel": _v1_memory(place, "memory.kmem"),
            "kernelTCP": _v1_memory(place, "memory.kmem.tcp"),
        }
        return _used(cache=raw.get("cache", 0)) | {name: one for name, one in found.items() if one} | {"raw": raw}
    events = place.table("memory.events")
    usage = {"limit": place.number("memory.max"), **_used(usage=place.number("memory.current"), max=place.number("memory.peak"))}
    usage["failcnt"] = events.get("max", 0)
    swap = {"limit": place.number("memory.swap.max"), **_used(usage=place.number("memory.swap.current")), "failcnt": 0}
    if _NO_LIMIT not in (swap["limit"], usage["limit"]):
        swap["limit"] += usage["limit"]  # memory and swap together, as v1 counts
    swap["usage"] = swap.get("usage", 0) + usage.get("usage", 0)
    return _used(cache=raw.get("file", 0)) | {"usage": usage, "swap": swap, "raw": raw}


def _v1_memory(place: _Files, prefix: str) -> Tree:
    if not place.text(f"{prefix}.limit_in_bytes"):
        return {}
    sizes = {key: place.number(f"{prefix}.{name}") for key, name in _V1_SIZES.items()}
    return {
        "limit": place.number(f"{prefix}.limit_in_bytes"),
        **_used(**sizes),
        "failcnt": place.number(f"{prefix}.failcnt"),
    }


def _pids(place: _Files) -> Tree:
    limit = place.number("pids.max")
    return _used(current=place.number("pids.current"), limit=0 if limit == _NO_LIMIT else limit)


def _blkio(place: _Files) -> Tree:
    found: dict[str, list[Tree]] = {}
    if place.modern:
        for line in place.text("io.stat").splitlines():
            device, *pairs = line.split()
            counted = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            for letter, operation in _V2_IO.items():
                for key, name in (("ioServiceBytesRecursive", "bytes"), ("ioServicedRecursive", "ios")):
                    found.setdefault(key, []).append(_transfer(device, operation, counted.get(letter + name, "0")))
        return found
    for name, key in _V1_BLKIO.items():
        for family in ("bfq", "throttle"):  # whichever the disk's scheduler counts in
            lines = place.text(f"blkio.{family}.{name}_recursive").splitlines()
            rows = [_transfer(*words) for words in map(str.split, lines) if len(words) == 3]
            if rows:
                found[key] = rows
                break
    return found


def _transfer(device: str, operation: str, value: str) -> Tree:
    major, _, minor = device.partition(":")
    return _used(major=int(major), minor=int(minor)) | {"op": operation} | _used(value=int(value))


def _hugetlb(place: _Files) -> Tree:
    ending = ".current" if place.modern else ".usage_in_bytes"
    found: Tree = {}
    for name in place.names():
        size = name.removeprefix("hugetlb.").removesuffix(ending)
        if name != f"hugetlb.{size}{ending}" or size.endswith((".rsvd", ".max")):
            continue
        if place.modern:
            failed, most = place.table(f"hugetlb.{size}.events").get("max", 0), 0
        else:
            failed, most = (place.number(f"hugetlb.{size}.{word}") for word in ("failcnt", "max_usage_in_bytes"))
        found[size] = _used(usage=place.number(name), max=most) | {"failcnt": failed}
    return found
