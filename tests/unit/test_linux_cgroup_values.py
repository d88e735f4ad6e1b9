"""OCI resources to cgroup files on v1 and v2, and the device program."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.linux import cgroup_values, device_bpf
from nacre.linux.cgroup_values import DeviceRule
from nacre.oci.errors import Invalid, Unsupported

MIB = 1 << 20


def lines(writes: list[cgroup_values.Write]) -> dict[str, str]:
    return {write.files[0]: write.value for write in writes}


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1024, 39), (262144, 10000), (0, 1), (999999999, 10000)])
def test_shares_become_weight(shares: int, weight: int) -> None:
    assert cgroup_values.shares_to_weight(shares) == weight


@given(st.integers(2, 262144), st.integers(2, 262144))
def test_more_shares_never_weigh_less(one: int, other: int) -> None:
    first, second = sorted((one, other))
    assert 1 <= cgroup_values.shares_to_weight(first) <= cgroup_values.shares_to_weight(second) <= 10000


def test_v2_swap_is_what_exceeds_memory() -> None:
    assert lines(cgroup_values.v2({"memory": {"limit": 10 * MIB, "swap": 30 * MIB}})) == {
        "memory.swap.max": str(20 * MIB),
        "memory.max": str(10 * MIB),
    }


@pytest.mark.parametrize("memory", [{"limit": 10 * MIB, "swap": 5 * MIB}, {"swap": 5 * MIB}])
def test_v2_swap_that_makes_no_sense_is_refused(memory: dict[str, int]) -> None:
    with pytest.raises(Invalid, match=r"memory\.swap"):
        cgroup_values.v2({"memory": memory})


def test_unlimited_is_minus_one_on_v1_and_max_on_v2() -> None:
    resources: dict[str, Any] = {"memory": {"limit": -1}, "pids": {"limit": -1}}
    assert lines(cgroup_values.v1(resources)) == {
        "memory.limit_in_bytes": "-1",
        "memory.memsw.limit_in_bytes": "-1",
        "pids.max": "max",
    }
    assert lines(cgroup_values.v2(resources)) == {"memory.swap.max": "max", "memory.max": "max", "pids.max": "max"}


def test_no_process_at_all_is_one_since_init_is_there() -> None:
    for make in (cgroup_values.v1, cgroup_values.v2):
        assert lines(make({"pids": {"limit": 0}})) == {"pids.max": "1"}


def test_cpu_quota_and_period() -> None:
    resources = {"cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-1"}}
    assert lines(cgroup_values.v1(resources)) == {
        "cpu.shares": "512",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
        "cpuset.cpus": "0-1",
    }
    assert lines(cgroup_values.v2(resources)) == {"cpu.weight": "20", "cpu.max": "50000 100000", "cpuset.cpus": "0-1"}


def test_realtime_is_refused_on_v2_by_name() -> None:
    with pytest.raises(Unsupported, match="realtime"):
        cgroup_values.v2({"cpu": {"realtimeRuntime": 1000}})


def test_block_limits_on_both_versions() -> None:
    resources = {"blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]}}
    assert lines(cgroup_values.v1(resources)) == {"blkio.weight": "500", "blkio.throttle.read_bps_device": "8:0 1000"}
    assert lines(cgroup_values.v2(resources)) == {"io.weight": "default 4950", "io.max": "8:0 rbps=1000"}


@pytest.mark.parametrize("name", ["../memory.max", "memory/max", "cgroup.procs", "max", ".x"])
def test_unified_takes_no_path_out_of_the_cgroup(name: str) -> None:
    with pytest.raises(Invalid, match="unified"):
        cgroup_values.unified({name: "1"})


def test_the_callers_device_rules_stay_in_order_before_the_defaults() -> None:
    rules = cgroup_values.device_rules(
        [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 10, "minor": 229}]
    )
    assert [rule.line() for rule in rules[:2]] == ["a", "c 10:229 rwm"] and rules[0].allow is False
    assert DeviceRule(True, "c", 1, 3, "rwm") in rules[2:]


def decide(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """A tiny interpreter of the instructions that device_bpf emits: an independent reading of what the kernel will do."""
    words = [struct.unpack_from("<BBhi", program, offset) for offset in range(0, len(program), 8)]
    registers = [0] * 11
    context = {0: kind | access << 16, 4: major, 8: minor}
    position = 0
    while True:
        code, regs, offset, value = words[position]
        target, source = regs & 15, regs >> 4
        position += 1
        match code:
            case 0x61:
                registers[target] = context[offset]
            case 0xBF:
                registers[target] = registers[source]
            case 0xB7:
                registers[target] = value
            case 0x57:
                registers[target] &= value
            case 0x77:
                registers[target] >>= value
            case 0x55:
                position += offset if registers[target] != value else 0
            case 0x15:
                position += offset if registers[target] == value else 0
            case 0x95:
                return registers[0]


CHARACTER, BLOCK, READ, WRITE, MKNOD = 2, 1, 2, 4, 1


def test_the_device_program_lets_the_last_rule_decide() -> None:
    rules = [DeviceRule(False, "a", -1, -1, "rwm"), DeviceRule(True, "c", 1, 3, "rw"), DeviceRule(False, "c", 1, 3, "w")]
    code = device_bpf.program(rules)
    assert decide(code, CHARACTER, READ, 1, 3) == 1
    assert decide(code, CHARACTER, WRITE, 1, 3) == 0
    assert decide(code, CHARACTER, READ | WRITE, 1, 3) == 0
    assert decide(code, CHARACTER, READ, 1, 5) == 0
    assert decide(code, BLOCK, READ, 1, 3) == 0


def test_a_device_that_no_rule_names_is_allowed_without_a_deny() -> None:
    assert decide(device_bpf.program([DeviceRule(True, "c", 1, 3, "r")]), BLOCK, READ, 8, 0) == 1


RULES = st.builds(
    DeviceRule,
    st.booleans(),
    st.sampled_from("bc"),
    st.integers(-1, 2),
    st.integers(-1, 2),
    st.sampled_from(["r", "w", "m", "rw", "rwm"]),
)


@given(st.lists(RULES, max_size=6), st.sampled_from([BLOCK, CHARACTER]), st.sampled_from([MKNOD, READ, WRITE]), st.integers(0, 2))
def test_the_device_program_agrees_with_reading_the_list(rules: list[DeviceRule], kind: int, access: int, number: int) -> None:
    letter = {READ: "r", WRITE: "w", MKNOD: "m"}[access]
    expected = 1
    for rule in rules:
        same = {"b": BLOCK, "c": CHARACTER}[rule.kind] == kind and rule.major in (-1, number) and rule.minor in (-1, number)
        if same and letter in rule.access:
            expected = int(rule.allow)
    assert decide(device_bpf.program(rules), kind, access, number, number) == expected


def test_a_network_class_asked_for_on_v2_is_not_dropped() -> None:
    assert [write.controller for write in cgroup_values.v2({"network": {"classID": 7}})] == ["net_cls"]


def test_what_v2_has_no_file_for_is_a_write_that_tells() -> None:
    memory = {"kernel": 1, "kernelTCP": 2, "swappiness": 10, "disableOOMKiller": True}
    told = {write.told for write in cgroup_values.v2({"memory": memory, "blockIO": {"leafWeight": 10}})}
    assert told == {"memory.kernel", "memory.kernelTCP", "memory.swappiness", "memory.disableOOMKiller", "blockIO.leafWeight"}
    assert cgroup_values.v2({"memory": {"disableOOMKiller": False}}) == []


@pytest.mark.parametrize("translate", [cgroup_values.v1, cgroup_values.v2])
def test_memory_and_swap_together_cannot_be_less_than_memory(translate: Any) -> None:
    with pytest.raises(Invalid, match="it counts both"):
        translate({"memory": {"limit": 64, "swap": 32}})
