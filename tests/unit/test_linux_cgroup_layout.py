"""Where controllers are found: v1, v2, hybrid, none, nested."""

from __future__ import annotations

from pathlib import Path

import pytest

from nacre.linux.cgroup_layout import CgroupMissing, Layout, missing, parse
from nacre.linux.cgroups import Cgroup, LimitRefused
from nacre.oci.errors import Failure, Invalid

V1 = """\
30 20 0:25 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
32 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:29 /docker/abc /mnt/with\\040blank rw - cgroup cgroup rw,pids
"""
OWN = "5:pids:/docker/abc/inner\n4:memory:/user\n3:cpu,cpuacct:/cpu\n2:name=systemd:/init.scope\n0::/v2\n"


def unified(tmp_path: Path, controllers: str) -> str:
    (tmp_path / "cgroup.controllers").write_text(controllers)
    return f"40 20 0:40 / {tmp_path} rw - cgroup2 cgroup2 rw\n"


def test_each_v1_controller_has_its_own_path() -> None:
    layout = parse(V1, OWN)
    assert layout.mode == "v1"
    found = {name: layout.find(name) for name in ("cpu", "cpuacct", "memory", "pids")}
    assert {name: one.own for name, one in found.items() if one} == {
        "cpu": "/cpu",
        "cpuacct": "/cpu",
        "memory": "/user",
        "pids": "/inner",
    }


def test_escaped_mount_points_are_read() -> None:
    pids = parse(V1, OWN).find("pids")
    assert pids is not None and pids.mount == "/mnt/with blank"


def test_v2_alone_has_devices_and_freezer_built_in(tmp_path: Path) -> None:
    layout = parse(unified(tmp_path, "cpu io memory pids"), "0::/a\n")
    assert layout.mode == "v2"
    assert all(layout.find(name) is layout.unified for name in ("memory", "blkio", "devices", "freezer", "cpuacct"))
    assert layout.find("hugetlb") is None


def test_hybrid_finds_each_controller_where_it_is(tmp_path: Path) -> None:
    layout = parse(V1 + unified(tmp_path, "hugetlb io"), OWN)
    assert layout.mode == "hybrid"
    versions = {name: getattr(layout.find(name), "version", None) for name in ("memory", "hugetlb", "blkio", "devices")}
    assert versions == {"memory": 1, "hugetlb": 2, "blkio": 2, "devices": None}


@pytest.mark.parametrize("modern", [None, "", "hugetlb io"])
def test_unified_keys_of_a_controller_on_v1_are_refused_with_its_place(tmp_path: Path, modern: str | None) -> None:
    cgroup = Cgroup(parse(V1 + ("" if modern is None else unified(tmp_path, modern)), OWN), "/web")
    for key, kind, cause in (
        ("pids.max", CgroupMissing, "on cgroup v1 here (/mnt/with blank)"),
        ("rdma.max", CgroupMissing, "nowhere mounted"),
        ("cgroup.procs", Invalid, "no controller's file"),
    ):
        with pytest.raises(Failure) as refused:
            cgroup.apply({"unified": {key: "33"}})
        assert isinstance(refused.value, kind) and cause in refused.value.cause


def test_no_cgroups_at_all_is_a_layout_too() -> None:
    layout = parse("20 1 8:1 / / rw - ext4 /dev/sda rw\n", "")
    assert layout.mode == "none" and layout.describe()[0] == "cpu: absent"


def test_the_root_goes_before_every_path() -> None:
    layout = parse(V1, OWN)
    hierarchy = layout.hierarchies[0]
    assert (
        Layout(hierarchies=layout.hierarchies, root="/corner").directory(hierarchy, "/a/b") == "/sys/fs/cgroup/systemd/corner/a/b"
    )


@pytest.mark.parametrize("controller", ["memory", "pids", "cpuset", "io"])
def test_a_missing_controller_is_named_with_where_it_was_looked_for_and_a_remedy(controller: str) -> None:
    failure = missing(controller, "set a limit", ("/sys/fs/cgroup/cpu (v1)",))
    assert f"controller {controller} " in failure.cause and "/sys/fs/cgroup/cpu (v1)" in failure.cause and failure.remedy


def test_what_cgroup_v2_has_and_a_part_of_it_was_not_given_is_not_called_unmounted() -> None:
    known = "cpu"  # no kernel with cgroups lacks it
    failure = missing(known, "set a limit", ("/sys/fs/cgroup (v2)",))
    assert "is not given it" in failure.cause and f"+{known}" in failure.remedy and "mount" not in failure.remedy


def test_where_no_cgroup_is_mounted_at_all_the_remedy_is_to_mount_them() -> None:
    failure = missing("memory", "limit a pod", parse("22 1 0:5 / / rw - ext4 /dev/vda rw\n", "0::/\n").looked)
    assert "no cgroup mount" in failure.cause and failure.remedy == "mount -t cgroup2 cgroup2 /sys/fs/cgroup"


def test_a_hierarchy_that_only_a_limit_asks_for_is_entered_and_cleared_like_the_others(tmp_path: Path) -> None:
    for name in ("memory", "net_cls"):
        (tmp_path / name).mkdir()
    mounts = "".join(
        f"{number} 20 0:{number} / {tmp_path}/{name} rw - cgroup cgroup rw,{name}\n"
        for number, name in ((31, "memory"), (32, "net_cls"))
    )
    layout = parse(mounts, "2:net_cls:/\n1:memory:/\n")
    cgroup = Cgroup(layout, "/one")
    cgroup.create()
    assert [directory for _, directory in cgroup.directories()] == [f"{tmp_path}/memory/one"]
    with pytest.raises(LimitRefused, match=r"net_cls\.classid"):  # a plain directory has no such file
        cgroup.apply({"network": {"classID": 7}})
    found = [directory for _, directory in cgroup.directories()]
    assert found == [f"{tmp_path}/memory/one", f"{tmp_path}/net_cls/one"]
    assert Cgroup(layout, "/one").directories() == cgroup.directories(), "whoever comes later finds it too"
    assert Cgroup(layout, "/two").directories() == Cgroup(layout, "/two").directories()[:1]
