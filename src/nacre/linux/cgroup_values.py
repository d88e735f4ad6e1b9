"""From OCI `linux.resources` to the lines that go into cgroup files: pure functions, one table of writes per cgroup version.

Units are the OCI specification's (config-linux.md "Control groups"): bytes, microseconds, shares. A write names the controller, so
that the caller finds its hierarchy; `optional` ones are for kernel files that come and go (kmem, swap accounting).
"""

from __future__ import annotations

from nacre.oci.errors import Invalid, Unsupported
from nacre.oci.values import Value

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

Resources = dict[str, "Any"]


class Write(Value, kw_only=False):
    """`value` into one of `files` (the first that exists) of the cgroup's directory in the controller's hierarchy."""

    controller: str
    files: tuple[str, ...]
    value: str
    optional: bool = False  # a kernel without the file honours it as well as it can: by doing nothing
    told: str = ""  # the property, if that is not what was asked: a warning says so


class DeviceRule(Value, kw_only=False):
    """One line of the device list, in the order that decides; -1 is any number."""

    allow: bool
    kind: str  # "a", "b" or "c"
    major: int
    minor: int
    access: str  # of "rwm"

    def line(self) -> str:
        if self.kind == "a":
            return "a"
        numbers = ":".join("*" if number < 0 else str(number) for number in (self.major, self.minor))
        return f"{self.kind} {numbers} {self.access}"


# What every container may use whatever its list says: making any node, the six default devices, its own terminals.
DEFAULT_DEVICES = (
    DeviceRule(True, "c", -1, -1, "m"),
    DeviceRule(True, "b", -1, -1, "m"),
    *(DeviceRule(True, "c", 1, minor, "rwm") for minor in (3, 5, 7, 8, 9)),
    *(DeviceRule(True, "c", 5, minor, "rwm") for minor in (0, 2)),
    DeviceRule(True, "c", 136, -1, "rwm"),
)


def device_rules(devices: list[dict[str, Any]]) -> list[DeviceRule]:
    """`resources.devices` and the defaults behind it; a rule of kind "a" with numbers stands for both block and character."""
    rules: list[DeviceRule] = []
    for device in devices:
        major, minor = device.get("major"), device.get("minor")
        kind = device.get("type") or "a"
        access = device.get("access") or "rwm"
        numbers = (-1 if major is None else major, -1 if minor is None else minor)
        kinds = ("b", "c") if kind == "a" and (numbers != (-1, -1) or set(access) != set("rwm")) else (kind,)
        rules += [DeviceRule(bool(device.get("allow")), one, *numbers, access) for one in kinds]
    return [*rules, *DEFAULT_DEVICES]


def shares_to_weight(shares: int) -> int:
    """cpu.shares (2…262144) as cpu.weight (1…10000): the conversion that engines and kubelets agree on."""
    shares = min(max(shares, 2), 262144)
    return 1 + (shares - 2) * 9999 // 262142


def io_weight(weight: int) -> int:
    """blkio weight (10…1000) as io.weight (1…10000)."""
    return 1 + (weight - 10) * 9999 // 990


def _limit(value: int, unlimited: str) -> str:
    return unlimited if value < 0 else str(value)


def v1(resources: Resources) -> list[Write]:
    """The writes for controllers on cgroup v1, in the order in which the kernel takes them for a new cgroup."""
    return [
        *_v1_memory(resources.get("memory") or {}),
        *_v1_cpu(resources.get("cpu") or {}),
        *_pids(resources.get("pids") or {}),
        *_v1_block(resources.get("blockIO") or {}),
        *_hugetlb(resources.get("hugepageLimits") or [], ".limit_in_bytes"),
        *_network(resources.get("network") or {}),
        *_rdma(resources.get("rdma") or {}),
    ]


def v2(resources: Resources) -> list[Write]:
    """The writes for controllers on cgroup v2; `unified` comes last and so wins."""
    return [
        *_v2_memory(resources.get("memory") or {}),
        *_v2_cpu(resources.get("cpu") or {}),
        *_pids(resources.get("pids") or {}),
        *_v2_block(resources.get("blockIO") or {}),
        *_hugetlb(resources.get("hugepageLimits") or [], ".max"),
        *_network(resources.get("network") or {}),  # on v1 or nowhere: whoever asks is told
        *_rdma(resources.get("rdma") or {}),
        *unified(resources.get("unified") or {}),
    ]


def unified(values: dict[str, str]) -> list[Write]:
    """`resources.unified`: file name to value, as it is. Raises Invalid for a name that is not a plain file of a controller."""
    writes: list[Write] = []
    for name, value in values.items():
        if "/" in name or "." not in name or name.startswith((".", "cgroup.")):
            raise Invalid(what="read linux.resources", cause=f'linux.resources.unified["{name}"] is no controller\'s file')
        writes += [Write(name.partition(".")[0], (name,), line) for line in value.splitlines() or [""]]
    return writes


def _check_swap(limit: int, swap: int) -> None:
    if 0 < swap < limit:
        raise Invalid(what="read linux.resources", cause=f"memory.swap {swap} is below memory.limit {limit}: it counts both")


def _v1_memory(memory: Resources) -> list[Write]:
    writes: list[Write] = []
    limit, swap = memory.get("limit"), memory.get("swap")
    _check_swap(limit or 0, swap or 0)
    if limit:
        writes.append(Write("memory", ("memory.limit_in_bytes",), _limit(limit, "-1")))
        if limit < 0 and not swap:
            swap = -1  # lifting the limit lifts the one on memory and swap, or the first would be refused later
    if swap:
        no_swap_wanted = swap < 0 or swap == limit
        writes.append(Write("memory", ("memory.memsw.limit_in_bytes",), _limit(swap, "-1"), optional=no_swap_wanted))
    if memory.get("reservation"):
        writes.append(Write("memory", ("memory.soft_limit_in_bytes",), _limit(memory["reservation"], "-1")))
    for key, name in (("kernel", "memory.kmem.limit_in_bytes"), ("kernelTCP", "memory.kmem.tcp.limit_in_bytes")):
        if memory.get(key):
            writes.append(Write("memory", (name,), _limit(memory[key], "-1"), optional=True, told=f"memory.{key}"))
    if memory.get("swappiness") is not None:
        writes.append(Write("memory", ("memory.swappiness",), str(memory["swappiness"])))
    if memory.get("disableOOMKiller"):
        writes.append(Write("memory", ("memory.oom_control",), "1"))
    return writes


def _v2_memory(memory: Resources) -> list[Write]:
    writes: list[Write] = []
    limit, swap = memory.get("limit"), memory.get("swap")
    if swap:
        if swap > 0 and limit and limit > 0:
            _check_swap(limit, swap)
            writes.append(Write("memory", ("memory.swap.max",), str(swap - limit), optional=swap == limit))
        elif swap > 0:
            raise Invalid(
                what="read linux.resources", cause="memory.swap counts memory and swap together, and memory.limit is missing"
            )
        else:
            writes.append(Write("memory", ("memory.swap.max",), "max", optional=True))
    elif limit and limit < 0:
        writes.append(Write("memory", ("memory.swap.max",), "max", optional=True))
    if limit:
        writes.append(Write("memory", ("memory.max",), _limit(limit, "max")))
    if memory.get("reservation"):
        writes.append(Write("memory", ("memory.low",), _limit(memory["reservation"], "max")))
    for key in ("kernel", "kernelTCP", "swappiness", "disableOOMKiller"):  # v1's alone
        if memory.get(key):
            writes.append(Write("memory", (f"memory.{key}",), str(memory[key]), optional=True, told=f"memory.{key}"))
    return writes


def _v1_cpu(cpu: Resources) -> list[Write]:
    files = {
        "shares": "cpu.shares",
        "period": "cpu.cfs_period_us",
        "quota": "cpu.cfs_quota_us",
        "realtimePeriod": "cpu.rt_period_us",
        "realtimeRuntime": "cpu.rt_runtime_us",
    }
    writes = [Write("cpu", (name,), str(max(cpu[key], -1))) for key, name in files.items() if cpu.get(key)]
    if cpu.get("burst") is not None:
        writes.append(Write("cpu", ("cpu.cfs_burst_us",), str(cpu["burst"]), optional=cpu["burst"] == 0))
    if cpu.get("idle") is not None:
        writes.append(Write("cpu", ("cpu.idle",), str(cpu["idle"]), optional=cpu["idle"] == 0))
    return [*writes, *_cpuset(cpu)]


def _v2_cpu(cpu: Resources) -> list[Write]:
    if cpu.get("realtimePeriod") or cpu.get("realtimeRuntime"):
        raise Unsupported(
            what="set a realtime limit", cause="cgroup v2 has no cpu.rt_runtime_us", remedy="remove cpu.realtimeRuntime"
        )
    writes: list[Write] = []
    if cpu.get("idle"):
        writes.append(Write("cpu", ("cpu.idle",), str(cpu["idle"])))
    elif cpu.get("shares"):
        writes.append(Write("cpu", ("cpu.weight",), str(shares_to_weight(cpu["shares"]))))
    if cpu.get("quota") or cpu.get("period"):
        quota = _limit(cpu.get("quota") or -1, "max")
        writes.append(Write("cpu", ("cpu.max",), f"{quota} {cpu.get('period') or 100000}"))
    if cpu.get("burst") is not None:
        writes.append(Write("cpu", ("cpu.max.burst",), str(cpu["burst"]), optional=cpu["burst"] == 0))
    return [*writes, *_cpuset(cpu)]


def _cpuset(cpu: Resources) -> list[Write]:
    return [Write("cpuset", (f"cpuset.{key}",), cpu[key]) for key in ("cpus", "mems") if cpu.get(key)]


def _pids(pids: Resources) -> list[Write]:
    limit = pids_limit(pids)
    return [] if limit is None else [Write("pids", ("pids.max",), "max" if limit < 0 else str(limit))]


def pids_limit(pids: Resources) -> int | None:
    """-1 for none. No process at all is one here: the init is there in any case, and systemd knows no TasksMax of 0."""
    limit: int | None = pids.get("limit")
    return limit if limit is None or limit < 0 else max(1, limit)


_THROTTLES = {  # OCI key: (v1 file, v2 word)
    "throttleReadBpsDevice": ("blkio.throttle.read_bps_device", "rbps"),
    "throttleWriteBpsDevice": ("blkio.throttle.write_bps_device", "wbps"),
    "throttleReadIOPSDevice": ("blkio.throttle.read_iops_device", "riops"),
    "throttleWriteIOPSDevice": ("blkio.throttle.write_iops_device", "wiops"),
}


def _v1_block(block: Resources) -> list[Write]:
    writes: list[Write] = []
    if block.get("weight"):
        writes.append(
            Write("blkio", ("blkio.weight", "blkio.bfq.weight"), str(block["weight"]), optional=True, told="blockIO.weight")
        )
    if block.get("leafWeight"):
        line = str(block["leafWeight"])
        writes.append(Write("blkio", ("blkio.leaf_weight",), line, optional=True, told="blockIO.leafWeight"))
    for device in block.get("weightDevice") or []:
        for key, names in (
            ("weight", ("blkio.weight_device", "blkio.bfq.weight_device")),
            ("leafWeight", ("blkio.leaf_weight_device",)),
        ):
            if device.get(key):
                line = f"{device['major']}:{device['minor']} {device[key]}"
                writes.append(Write("blkio", names, line, optional=True, told=f"blockIO.weightDevice.{key}"))
    for key, (name, _) in _THROTTLES.items():
        for device in block.get(key) or []:
            writes.append(Write("blkio", (name,), f"{device['major']}:{device['minor']} {device['rate']}"))
    return writes


def _v2_block(block: Resources) -> list[Write]:
    writes: list[Write] = []
    if block.get("weight"):
        line = f"default {io_weight(block['weight'])}"
        writes.append(Write("io", ("io.weight", "io.bfq.weight"), line, optional=True, told="blockIO.weight"))
    if block.get("leafWeight"):
        writes.append(Write("io", ("io.leaf_weight",), str(block["leafWeight"]), optional=True, told="blockIO.leafWeight"))
    for device in block.get("weightDevice") or []:
        if device.get("weight"):
            line = f"{device['major']}:{device['minor']} {io_weight(device['weight'])}"
            writes.append(Write("io", ("io.weight", "io.bfq.weight"), line, optional=True, told="blockIO.weightDevice.weight"))
    for key, (_, word) in _THROTTLES.items():
        for device in block.get(key) or []:
            rate = device["rate"] or "max"
            writes.append(Write("io", ("io.max",), f"{device['major']}:{device['minor']} {word}={rate}"))
    return writes


def _hugetlb(limits: list[Resources], suffix: str) -> list[Write]:
    writes: list[Write] = []
    for limit in limits:
        size = limit["pageSize"]
        if not size.isalnum():
            raise Invalid(what="read linux.resources", cause=f"hugepageLimits has the page size {size!r}")
        writes.append(Write("hugetlb", (f"hugetlb.{size}{suffix}",), str(limit["limit"])))
        writes.append(Write("hugetlb", (f"hugetlb.{size}.rsvd{suffix}",), str(limit["limit"]), optional=True))
    return writes


def _network(network: Resources) -> list[Write]:
    writes: list[Write] = []
    if network.get("classID"):
        writes.append(Write("net_cls", ("net_cls.classid",), str(network["classID"])))
    for priority in network.get("priorities") or []:
        writes.append(Write("net_prio", ("net_prio.ifpriomap",), f"{priority['name']} {priority['priority']}"))
    return writes


def _rdma(rdma: Resources) -> list[Write]:
    writes: list[Write] = []
    for device, limits in rdma.items():
        words = [
            f"{word}={limits[key]}" for key, word in (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object")) if key in limits
        ]
        writes.append(Write("rdma", ("rdma.max",), " ".join([device, *words])))
    return writes
