"""The figures of `events`, out of the files of either cgroup version. What this host really has is compared with runc in tests/host."""

from __future__ import annotations

from pathlib import Path

from nacre.linux.cgroups import Cgroup, Hierarchy, Layout
from nacre.runc.figures import figures

V2 = {
    "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 7\nnr_throttled 2\nthrottled_usec 5\n",
    "cpuset.cpus.effective": "0-2,5\n",
    "cpuset.mems.effective": "0\n",
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.max": "max\n",
    "memory.swap.current": "100\n",
    "memory.swap.max": "1000\n",
    "memory.stat": "anon 1\nfile 3\n",
    "memory.events": "max 4\noom_kill 1\n",
    "pids.current": "3\n",
    "pids.max": "max\n",
    "io.stat": "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.events": "max 6\n",
    "hugetlb.2MB.rsvd.current": "0\n",
}
V1 = {
    "hugetlb.1GB.usage_in_bytes": "5\n",
    "hugetlb.1GB.max_usage_in_bytes": "9\n",
    "hugetlb.1GB.failcnt": "1\n",
    "hugetlb.1GB.rsvd.usage_in_bytes": "0\n",
    "blkio.bfq.io_serviced_recursive": "Total 0\n",
    "blkio.throttle.io_serviced_recursive": "8:0 Read 3\n8:0 Write 0\nTotal 3\n",
}


def group(mount: Path, version: int, files: dict[str, str], *controllers: str) -> Cgroup:
    (mount / "x").mkdir()
    for name, text in files.items():
        (mount / "x" / name).write_text(text)
    return Cgroup(Layout(hierarchies=(Hierarchy(mount=str(mount), version=version, controllers=frozenset(controllers)),)), "/x")


def test_version_two_is_told_in_version_ones_units(tmp_path: Path) -> None:
    found = figures(group(tmp_path, 2, V2, "cpu", "cpuset", "memory", "io", "pids", "hugetlb"))
    assert found["cpu"] == {
        "usage": {"total": 30_000, "user": 20_000, "kernel": 10_000},
        "throttling": {"periods": 7, "throttledPeriods": 2, "throttledTime": 5000},
    }
    assert found["cpuset"] == {"cpus": [0, 1, 2, 5], "mems": [0]}
    assert found["memory"] == {
        "cache": 3,
        "usage": {"limit": (1 << 64) - 1, "usage": 4096, "max": 8192, "failcnt": 4},
        "swap": {"limit": 1000, "usage": 4196, "failcnt": 0},
        "raw": {"anon": 1, "file": 3},
    }
    assert found["pids"] == {"current": 3}
    assert found["blkio"]["ioServiceBytesRecursive"][:2] == [
        {"major": 8, "minor": 16, "op": "Read", "value": 10},
        {"major": 8, "minor": 16, "op": "Write", "value": 20},
    ]
    assert found["hugetlb"] == {"2MB": {"usage": 2097152, "failcnt": 6}}


def test_version_ones_devices_and_huge_pages(tmp_path: Path) -> None:
    found = figures(group(tmp_path, 1, V1, "blkio", "hugetlb"))
    assert found["hugetlb"] == {"1GB": {"usage": 5, "max": 9, "failcnt": 1}}
    assert found["blkio"] == {"ioServicedRecursive": [{"major": 8, "op": "Read", "value": 3}, {"major": 8, "op": "Write"}]}
    assert found["memory"] == found["cpuset"] == {} and found["cpu"]["usage"]["total"] == 0


def test_a_group_that_is_gone_has_no_figures(tmp_path: Path) -> None:
    cgroup = group(tmp_path, 2, {}, "cpu", "cpuset", "memory", "io", "pids", "hugetlb")
    (tmp_path / "x").rmdir()
    assert figures(cgroup)["hugetlb"] == {} and figures(cgroup)["pids"] == {}


def test_a_scope_that_is_gone_is_told_what_came_to_its_slice_since_it_was_asked(tmp_path: Path) -> None:
    """systemd takes a scope away with its last process; in the slice others were killed before."""
    scope = tmp_path / "pod.slice/one.scope"
    scope.mkdir(parents=True)
    (scope / "memory.events").write_text("oom_kill 1\n")
    (scope.parent / "memory.events").write_text("oom_kill 7\n")
    layout = Layout(hierarchies=(Hierarchy(mount=str(tmp_path), version=2, controllers=frozenset({"memory"})),))
    cgroup = Cgroup(layout, "/pod.slice/one.scope")
    assert cgroup.oom_kills() == 1
    (scope / "memory.events").unlink()
    scope.rmdir()
    assert cgroup.oom_kills() == 1, "those of the slice's other containers"
    (scope.parent / "memory.events").write_text("oom_kill 8\n")
    assert cgroup.oom_kills() == 2
