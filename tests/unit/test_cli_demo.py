"""What the demo counts as its own when it compares the host after with the host before."""

from __future__ import annotations

from dataclasses import replace

from nacre.cli.demo.proof import Photograph, differences

NOTHING: frozenset[str] = frozenset()
BEFORE = Photograph(
    census=NOTHING,
    mounts=frozenset({"/ (ext4)"}),
    links=frozenset({"lo", "docker0"}),
    addresses=frozenset({"127.0.0.1"}),
    tables=NOTHING,
    cgroups=NOTHING,
    sysctls=frozenset({"net.ipv4.ip_forward = 0"}),
)
HELD = frozenset({"/run/nacre/pods/x/shm", "nacre0", "nv1", "ip nacre", "/sys/fs/cgroup/nacre", "10.118.0.1"})


def test_what_the_node_had_and_is_still_there_is_left() -> None:
    after = replace(
        BEFORE,
        mounts=BEFORE.mounts | {"/run/nacre/pods/x/shm (tmpfs)"},
        links=BEFORE.links | {"nacre0"},
        tables=frozenset({"ip nacre"}),
    )
    ours, others = differences(BEFORE, after, HELD)
    assert ours == ["mounts: /run/nacre/pods/x/shm (tmpfs) is new", "links: nacre0 is new", "tables: ip nacre is new"]
    assert others == []


def test_a_sysctl_and_anything_of_the_census_are_always_the_nodes() -> None:
    after = replace(BEFORE, census=frozenset({"process pid 7 (qemu)"}), sysctls=frozenset({"net.ipv4.ip_forward = 1"}))
    ours, _others = differences(BEFORE, after, frozenset())
    assert ours == [
        "census: process pid 7 (qemu) is new",
        "sysctls: net.ipv4.ip_forward = 1 is new",
        "sysctls: net.ipv4.ip_forward = 0 is gone",
    ]


def test_what_other_software_did_meanwhile_is_told_and_is_no_failure() -> None:
    after = replace(BEFORE, links=frozenset({"lo", "veth9"}), mounts=NOTHING)
    ours, others = differences(BEFORE, after, HELD)
    assert ours == []
    assert others == ["mounts: / (ext4) is gone", "links: veth9 is new", "links: docker0 is gone"]
