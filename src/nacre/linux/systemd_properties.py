"""From OCI resources, and from annotations, to properties of systemd's units. systemd.resource-control(5), org.freedesktop.systemd1(5).

Pure but for `/proc/devices`: systemd names devices by their drivers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nacre.linux import cgroup_values, gvariant
from nacre.linux.cgroup_layout import Layout
from nacre.linux.cgroup_values import DeviceRule
from nacre.linux.dbus import Variant
from nacre.oci.errors import Invalid

PROPERTY = "org.systemd.property."  # of an annotation's key
_INFINITY = (1 << 64) - 1

Properties = list[tuple[str, Variant]]


def properties_in(annotations: Mapping[str, str]) -> Properties:
    """Those that annotations `org.systemd.property.NAME` write as GVariant text, NAMESec in seconds. Raises Invalid."""
    named: Properties = []
    for key, text in annotations.items():
        if not key.startswith(PROPERTY):
            continue
        name, what = key.removeprefix(PROPERTY), f"read the annotation {key}"
        if len(name) < 3 or not (name.isascii() and name.isalnum()) or not name[0].isupper():
            raise Invalid(what=what, cause=f"{name!r} is no name of a property")
        value = gvariant.parse(text, what)
        if name.endswith("Sec") and not name.endswith("USec"):
            if value.signature in ("b", "s", "as") or value.value < 0:
                raise Invalid(what=what, cause=f"{text!r} is no number of seconds")
            name, value = name.removesuffix("Sec") + "USec", Variant("t", value.value * 1_000_000)
        named.append((name, value))
    return named


def properties_of(resources: dict[str, Any], layout: Layout) -> Properties:
    """What systemd has a name for, as engines agree to map it; anything else is for the files alone."""
    modern = layout.mode == "v2"
    named = [
        *_cpu(resources.get("cpu") or {}, modern=modern),
        *_memory(resources.get("memory") or {}, modern=modern),
        *_block(resources.get("blockIO") or {}, modern=modern),
    ]
    limit = cgroup_values.pids_limit(resources.get("pids") or {})
    if limit is not None:
        named.append(("TasksMax", _bound(limit)))
    if resources.get("devices") is not None:
        named += _devices(cgroup_values.device_rules(resources["devices"]))
    if modern:
        named += _unified(resources.get("unified") or {})
    return named


def _bound(value: int) -> Variant:
    return Variant("t", value if value >= 0 else _INFINITY)


def _cpu(cpu: dict[str, Any], *, modern: bool) -> Properties:
    named: Properties = []
    if cpu.get("shares"):
        weight = ("CPUWeight", cgroup_values.shares_to_weight(cpu["shares"])) if modern else ("CPUShares", max(2, cpu["shares"]))
        named.append((weight[0], Variant("t", weight[1])))
    if cpu.get("quota") or cpu.get("period"):
        named += _quota(cpu.get("quota") or -1, cpu.get("period") or 0)
    if modern:
        for key, name in (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes")):
            if cpu.get(key):
                named.append((name, Variant("ay", _mask(cpu[key]))))
    return named


def _quota(quota: int, period: int) -> Properties:
    """systemd counts microseconds per second, in whole percents of a CPU: rounded up, as too little would be a broken promise."""
    per_second = _INFINITY
    if quota > 0:
        per_second = quota * 1_000_000 // (period or 100_000)
        per_second += -per_second % 10_000
    named: Properties = [("CPUQuotaPerSecUSec", Variant("t", per_second))]
    return [("CPUQuotaPeriodUSec", Variant("t", period)), *named] if period else named


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _mask(ranges: str) -> bytes:
    """ "0-2,5" as a bit mask, least first. What is no such list is left to the kernel's own judgement: an empty mask."""
    bits = 0
    for one in ranges.split(","):
        first, _, last = one.strip().partition("-")
        if not _is_number(first) or not _is_number(last or first) or int(last or first) > 8191:
            return b""
        bits |= ((1 << (int(last or first) - int(first) + 1)) - 1) << int(first) if int(last or first) >= int(first) else 0
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def _memory(memory: dict[str, Any], *, modern: bool) -> Properties:
    limit, swap = memory.get("limit"), memory.get("swap")
    if not modern:
        return [("MemoryLimit", _bound(limit))] if limit else []
    named: Properties = [("MemoryMax", _bound(limit))] if limit else []
    if memory.get("reservation"):
        named.append(("MemoryLow", _bound(memory["reservation"])))
    if swap and swap < 0:
        named.append(("MemorySwapMax", Variant("t", _INFINITY)))
    elif swap and limit and 0 < limit <= swap:
        named.append(("MemorySwapMax", Variant("t", swap - limit)))
    return named


def _block(block: dict[str, Any], *, modern: bool) -> Properties:
    if not block.get("weight"):
        return []
    if modern:
        return [("IOWeight", Variant("t", cgroup_values.io_weight(block["weight"])))]
    return [("BlockIOWeight", Variant("t", block["weight"]))]


_UNIFIED = {
    "cpu.weight": "CPUWeight",
    "memory.min": "MemoryMin",
    "memory.low": "MemoryLow",
    "memory.high": "MemoryHigh",
    "memory.max": "MemoryMax",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
}


def _unified(unified: dict[str, str]) -> Properties:
    named: Properties = []
    for key, text in unified.items():
        word = text.strip()
        if key in _UNIFIED and (word == "max" or _is_number(word)):
            named.append((_UNIFIED[key], Variant("t", _INFINITY if word == "max" else int(word))))
        elif key in ("cpuset.cpus", "cpuset.mems") and (mask := _mask(word)):
            named.append(({"cpuset.cpus": "AllowedCPUs", "cpuset.mems": "AllowedMemoryNodes"}[key], Variant("ay", mask)))
        elif key == "cpu.max":
            quota, _, period = word.partition(" ")
            if (quota == "max" or _is_number(quota)) and (not period or _is_number(period)):
                named += _quota(-1 if quota == "max" else int(quota), int(period or 0))
    return named


def _devices(rules: list[DeviceRule]) -> Properties:
    """systemd knows lists of what is allowed only. What such a list cannot say is denied by the rules that we attach beside it."""
    allowed: list[DeviceRule] = []
    everything = True  # a fresh cgroup's answer
    for rule in rules:
        if rule.kind == "a":
            everything, allowed = rule.allow, []
        elif rule.allow and not everything:
            allowed.append(rule)
        elif not everything:
            allowed = [
                one
                for one in allowed
                if (one.kind, one.major, one.minor, one.access) != (rule.kind, rule.major, rule.minor, rule.access)
            ]
    if everything:
        return [("DevicePolicy", Variant("s", "auto")), ("DeviceAllow", Variant("a(ss)", []))]
    drivers = _drivers()
    entries = [(path, rule.access) for rule in allowed for path in _device_paths(rule, drivers)]
    # The empty list first: setting the property appends, and an old list must go.
    return [
        ("DevicePolicy", Variant("s", "strict")),
        ("DeviceAllow", Variant("a(ss)", [])),
        ("DeviceAllow", Variant("a(ss)", entries)),
    ]


def _device_paths(rule: DeviceRule, drivers: dict[tuple[str, int], str]) -> list[str]:
    word = {"c": "char", "b": "block"}[rule.kind]
    if rule.major < 0:
        return [f"{word}-*"] if rule.minor < 0 else []
    if rule.minor < 0:  # by the driver's name; one that is not loaded has no device to open
        return [f"{word}-{drivers[rule.kind, rule.major]}"] if (rule.kind, rule.major) in drivers else []
    return [f"/dev/{word}/{rule.major}:{rule.minor}"]


def _drivers() -> dict[tuple[str, int], str]:
    """(kind, major) to name, from /proc/devices."""
    found: dict[tuple[str, int], str] = {}
    kind = "c"
    with open("/proc/devices", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if line.startswith("Block"):
                kind = "b"
            elif len(words) == 2 and words[0].isdigit():
                found.setdefault((kind, int(words[0])), words[1])
    return found
