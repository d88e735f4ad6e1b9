"""Limits on this host's own cgroup layout, whatever it is: asked for in OCI words, read back from the kernel's files."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_runc_namespaces
from runc_support import CGROUP_PARENT, SYSTEMD, Bundle, leftovers, made, with_user_namespace
from test_runc_namespaces import Ordinary

from nacre.linux import cgroup_files, cgroups

MIB = 1 << 20
ordinary = test_runc_namespaces.ordinary


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def read(bundle: Bundle, controller: str, v1: str, v2: str) -> str:
    """The file of the container's cgroup, by the version that the controller is on."""
    layout = cgroups.discover(controller)
    hierarchy = layout.need(controller, "test")
    directory = layout.directory(hierarchy, bundle.cgroup)
    return Path(directory, v1 if hierarchy.version == 1 else v2).read_text().strip()


def test_memory_cpu_and_pids_limits_reach_the_kernel(bundle: Bundle) -> None:
    bundle.linux["resources"] |= {
        "memory": {"limit": 64 * MIB, "reservation": 32 * MIB},
        "cpu": {"shares": 512, "quota": 20000, "period": 100000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 17},
    }
    pid = bundle.up()
    assert read(bundle, "memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert read(bundle, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "20000"
    assert read(bundle, "cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    assert read(bundle, "pids", "pids.max", "pids.max") == "17"
    assert os.sched_getaffinity(pid) == {0}
    assert str(pid) in read(bundle, "memory", "cgroup.procs", "cgroup.procs").split()


def test_update_changes_what_is_named_and_leaves_the_rest(bundle: Bundle, tmp_path: Path) -> None:
    bundle.linux["resources"] |= {"memory": {"limit": 64 * MIB}, "pids": {"limit": 17}}
    bundle.up()
    bundle.ok("update", "--memory", "96m", "--cpu-quota", "30000", "--cpu-period", "100000", bundle.name)
    assert read(bundle, "memory", "memory.limit_in_bytes", "memory.max") == str(96 * MIB)
    assert read(bundle, "pids", "pids.max", "pids.max") == "17"
    (tmp_path / "r.json").write_text(json.dumps({"pids": {"limit": 21}}))
    bundle.ok("update", "-r", str(tmp_path / "r.json"), bundle.name)
    assert read(bundle, "pids", "pids.max", "pids.max") == "21"
    bundle.ok("update", "--resources", "-", bundle.name, input='{"pids": {"limit": 22}}')
    assert read(bundle, "pids", "pids.max", "pids.max") == "22"
    assert "linux.resources.pids.limit" in bundle.fails("update", "-r", "-", bundle.name, input='{"pids": {"limit": "many"}}')


@pytest.mark.parametrize(("version", "meant"), [("1.3.0", "1"), ("1.2.1", "max")])
def test_no_process_at_all_is_a_limit_since_version_1_3_and_none_before(bundle: Bundle, version: str, meant: str) -> None:
    bundle.config["ociVersion"] = version
    bundle.linux["resources"] |= {"pids": {"limit": 0}}
    bundle.up()
    assert read(bundle, "pids", "pids.max", "pids.max") == meant
    bundle.ok("update", "--pids-limit", "9", bundle.name)
    bundle.ok("update", "--pids-limit", "0", bundle.name)
    assert read(bundle, "pids", "pids.max", "pids.max") == meant


@pytest.mark.skipif(cgroups.discover().mode != "v2", reason="cgroups are given to a user on pure v2 alone")
@pytest.mark.parametrize("options", [("rw",), ("ro",)])
def test_a_writable_cgroup_belongs_to_the_containers_user(bundle: Bundle, options: tuple[str, ...]) -> None:
    with_user_namespace(bundle)
    (shown,) = (mount for mount in bundle.config["mounts"] if mount["type"] == "cgroup")
    shown["options"] = [*options, "nosuid"]
    bundle.up()
    directory = cgroups.Cgroup(cgroups.discover(), bundle.cgroup).directories()[0][1]
    owner = bundle.linux["uidMappings"][0]["hostID"] if "rw" in options else 0
    assert [os.stat(f"{directory}/{name}").st_uid for name in ("", "cgroup.procs", "memory.max")] == [owner, owner, 0]
    assert ("mkdir" in bundle.inside("mkdir /sys/fs/cgroup/own && echo mkdir || true")) == ("rw" in options)


def fill(bundle: Bundle) -> None:
    """32 of the 64 MiB that it may have are in use when this returns, and the kernel cannot give them back."""
    bundle.linux["resources"]["memory"] = {"limit": 64 * MIB}
    bundle.mount("/mnt", "tmpfs", "tmpfs")
    bundle.up("dd if=/dev/zero of=/mnt/fill bs=1M count=32 2>/dev/null; echo full; exec sleep 100")
    while "full" not in bundle.output():
        pass


def test_a_quota_and_its_period_are_changed_in_an_order_that_a_limited_parent_allows(bundle: Bundle) -> None:
    hierarchy = cgroups.discover("cpu").need("cpu", "test")
    if hierarchy.version == 2:
        pytest.skip("v2 takes both in one line, and does not compare them with the parent's")
    parent = Path(f"{hierarchy.mount}{bundle.cgroup}")
    bundle.linux["cgroupsPath"] = f"{bundle.cgroup}/below"
    bundle.linux["resources"]["cpu"] = {"period": 1000000, "quota": 500000}
    parent.mkdir(parents=True)
    (parent / "cpu.cfs_quota_us").write_text("50000")
    try:
        bundle.up()
        for period, quota in ((10000, 3000), (100000, 50000)):
            bundle.ok("update", bundle.name, "--cpu-period", str(period), "--cpu-quota", str(quota))
            assert (parent / "below/cpu.cfs_quota_us").read_text() == f"{quota}\n"
    finally:
        bundle.call("delete", "--force", bundle.name)
        for one in cgroups.discover().hierarchies:
            if (made_there := Path(f"{one.mount}{bundle.cgroup}")).exists():
                made_there.rmdir()


def test_a_burst_is_taken_back_by_0(bundle: Bundle) -> None:
    bundle.linux["resources"]["cpu"] = {"period": 900000, "quota": 600000, "burst": 500000}
    bundle.up()
    for burst in ("400000", "0"):
        bundle.ok("update", bundle.name, "--cpu-burst", burst)
        assert read(bundle, "cpu", "cpu.cfs_burst_us", "cpu.max.burst") == burst


def test_a_limit_on_memory_and_swap_is_changed_alone_where_v1_has_it(bundle: Bundle) -> None:
    hierarchy = cgroups.discover("memory").need("memory", "test")
    if hierarchy.version == 2 or not os.path.exists(f"{hierarchy.mount}/memory.memsw.limit_in_bytes"):
        pytest.skip("memory is on v2 here, or swap is not counted")
    bundle.linux["resources"]["memory"] = {"limit": 32 * MIB, "swap": 64 * MIB}
    bundle.up()
    bundle.ok("update", bundle.name, "--memory-swap", str(96 * MIB))
    assert read(bundle, "memory", "memory.memsw.limit_in_bytes", "") == str(96 * MIB)


def test_a_parent_whose_cpuset_nobody_has_filled_is_filled(bundle: Bundle) -> None:
    hierarchy = cgroups.discover("cpuset").need("cpuset", "test")
    parent = Path(f"{hierarchy.mount}{bundle.cgroup}")
    bundle.linux["cgroupsPath"] = f"{bundle.cgroup}/below"
    parent.mkdir(parents=True)
    try:
        assert bundle.says("echo in") == "in\n"
    finally:
        bundle.call("delete", "--force", bundle.name)
        for one in cgroups.discover().hierarchies:
            if (made_there := Path(f"{one.mount}{bundle.cgroup}")).exists():
                made_there.rmdir()


def test_realtime_limits_are_changed_in_an_order_that_the_kernel_takes(bundle: Bundle) -> None:
    hierarchy = cgroups.discover("cpu").find("cpu")
    if hierarchy is None or not os.path.exists(f"{hierarchy.mount}/cpu.rt_period_us"):
        pytest.skip("this kernel has no realtime limits for groups")
    bundle.linux["resources"]["cpu"] = {"realtimePeriod": 900000, "realtimeRuntime": 60000}
    bundle.up()
    for period, runtime in ((10000, 3000), (100000, 20000), (50000, 30000)):
        bundle.ok("update", bundle.name, "--cpu-rt-period", str(period), "--cpu-rt-runtime", str(runtime))
        assert read(bundle, "cpu", "cpu.rt_period_us", "") == str(period)
        assert read(bundle, "cpu", "cpu.rt_runtime_us", "") == str(runtime)


def test_a_limit_below_what_is_in_use_is_refused_with_the_figures(bundle: Bundle) -> None:
    if cgroups.discover().need("memory", "test").version == 2:
        pytest.skip("cgroup v2 takes any limit, and kills for it")
    fill(bundle)
    said = bundle.fails("update", "--memory", "1m", "--memory-swap", "1m", bundle.name)
    assert "Device or resource busy" in said and "memory.usage_in_bytes is" in said


def test_a_limit_is_checked_before_it_is_set_when_asked(bundle: Bundle) -> None:
    fill(bundle)
    asked = '{"memory": {"limit": %d, "checkBeforeUpdate": true}}'
    assert "memory.checkBeforeUpdate is set" in bundle.fails("update", "-r", "-", bundle.name, input=asked % MIB)
    assert read(bundle, "memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    bundle.ok("update", "-r", "-", bundle.name, input=asked % (48 * MIB))
    assert read(bundle, "memory", "memory.limit_in_bytes", "memory.max") == str(48 * MIB)


def test_a_limit_that_this_host_has_no_file_for_is_told_in_the_log(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    bundle.linux["resources"]["blockIO"] = {"leafWeight": 500}
    bundle.script("sleep 100").write()
    with (tmp_path / "out").open("w") as out:
        words = ("--log", str(log), "run", "--detach", "-b", str(bundle.path), bundle.name)
        bundle.ok(*words, stdout=out, stderr=out, capture_output=False)
    warning = "linux.resources.blockIO.leafWeight is left out: the cgroups of this host have no file for it"
    assert log.read_text().count(warning) == 1
    bundle.ok("--log", str(log), "update", "-r", "-", bundle.name, input='{"blockIO": {"leafWeight": 400}}')
    assert log.read_text().count(warning) == 2


def test_a_container_that_needs_more_memory_than_its_limit_is_killed(bundle: Bundle) -> None:
    bundle.linux["resources"]["memory"] = {"limit": 16 * MIB, "swap": 16 * MIB}
    bundle.mount("/mnt", "tmpfs", "tmpfs")
    done = bundle.run("dd if=/dev/zero of=/mnt/fill bs=1M count=64 2>/dev/null; exit $?")
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("limit", [512 << 10, 1 << 20, 4 << 20])
def test_a_tiny_memory_limit_starts_or_says_that_memory_ran_out(bundle: Bundle, limit: int) -> None:
    """Below what a runtime's own set-up takes others fail with "EOF"."""
    bundle.linux["resources"]["memory"] = {"limit": limit}
    done = bundle.run("echo started")
    assert done.stdout == "started\n" or "out of memory in cgroup" in done.stderr or done.returncode == 137, done.stderr
    assert leftovers(bundle) == []


def test_device_rules_are_applied_in_order_and_hold(bundle: Bundle) -> None:
    bundle.linux["devices"] = [{"type": "c", "path": "/dev/tun9", "major": 10, "minor": 200}]
    read_tun = "dd if=/dev/tun9 bs=1 count=0 2>/dev/null && echo may || echo may not"
    deny = {"allow": False, "access": "rwm"}
    allow = {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "r"}
    bundle.linux["resources"]["devices"] = [deny]
    assert bundle.says(read_tun) == "may not\n"
    bundle.linux["resources"]["devices"] = [deny, allow]
    assert bundle.says(read_tun + "; echo x 2>/dev/null > /dev/tun9 || echo no writing") == "may\nno writing\n"
    bundle.linux["resources"]["devices"] = [allow, deny]
    assert bundle.says(read_tun + "; echo x > /dev/null && echo default") == "may not\ndefault\n"


def test_a_rate_for_a_block_device_reaches_the_kernel(bundle: Bundle) -> None:
    major, minor = 7, 0
    bundle.linux["resources"]["blockIO"] = {
        "throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": 1048576}],
        "throttleWriteIOPSDevice": [{"major": major, "minor": minor, "rate": 100}],
        "weight": 500,
    }
    if not Path(f"/sys/dev/block/{major}:{minor}").exists():
        pytest.skip("stat(2) /sys/dev/block/7:0: no loop device here")
    bundle.up()
    assert f"{major}:{minor} " in read(bundle, "blkio", "blkio.throttle.read_bps_device", "io.max")


def test_a_huge_page_limit_reaches_the_kernel(bundle: Bundle) -> None:
    layout = cgroups.discover()
    if layout.find("hugetlb") is None:
        bundle.linux["resources"]["hugepageLimits"] = [{"pageSize": "2MB", "limit": 4 * MIB}]
        assert "controller hugetlb is nowhere mounted" in bundle.refuses("true")
        return
    bundle.linux["resources"]["hugepageLimits"] = [{"pageSize": "2MB", "limit": 4 * MIB}]
    bundle.up()
    assert read(bundle, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max") == str(4 * MIB)


def test_a_controller_that_is_kept_from_a_user_is_named_with_its_keeper(ordinary: Ordinary) -> None:
    """A group that is his, below one that hands nothing down: it has no file for the limit, as if the kernel knew none."""
    layout = cgroups.discover()
    if layout.unified is None or not layout.unified.controllers & {"pids", "hugetlb"}:
        pytest.skip("cgroup v2 has no controllers here")
    above = cgroups.Cgroup(layout, f"{CGROUP_PARENT}-{ordinary.place.parent.name}")
    try:
        above.create(limits=False)
        for _, directory in above.directories():
            os.chown(directory, test_runc_namespaces.USER, -1)
        ordinary.config["linux"]["cgroupsPath"] = f"{above.path}/inner"
        limits = {"pids": {"pids": {"limit": 9}}, "hugetlb": {"hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}]}}
        controller = "pids" if "pids" in layout.unified.controllers else "hugetlb"
        cgroup_files.hand_down(
            layout.unified.mount, controller
        )  # where nobody has asked the root for it yet, that would be the keeper
        ordinary.config["linux"]["resources"] = limits[controller]
        told = ordinary.run("true").stderr
        assert f"cgroup {layout.directory(layout.unified, above.path)} does not hand the controller {controller} down: " in told
        assert "Permission denied" in told and "it belongs to user 0" in told and "Delegate=yes" in told
    finally:
        above.remove()


def test_unified_keys_go_to_v2_or_are_refused_by_name(bundle: Bundle) -> None:
    bundle.linux["resources"]["unified"] = {"pids.max": "33"}
    if cgroups.discover().need("pids", "test").version == 2:
        bundle.up()
        assert read(bundle, "pids", "", "pids.max") == "33"
        bundle.ok("delete", "--force", bundle.name)
    else:
        message = bundle.refuses("true")
        assert "pids.max" in message and "cgroup v1 here" in message
        assert leftovers(bundle) == []
    bundle.linux["resources"]["unified"] = {"cgroup.procs": "1"}
    assert "no controller's file" in bundle.refuses("true")


@pytest.mark.parametrize(
    ("resources", "named"),
    [
        ({"cpu": {"cpus": "4000"}}, "cpuset.cpus"),
        ({"cpu": {"quota": 10, "period": 100000}}, "cpu."),
        ({"rdma": {"mlx5_0": {"hcaHandles": 1}}}, "rdma"),
        ({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}, "hugetlb"),
    ],
)
def test_what_the_kernel_refuses_is_named_and_undone(bundle: Bundle, resources: dict[str, object], named: str) -> None:
    bundle.linux["resources"] |= resources
    assert named in bundle.refuses("true")
    assert leftovers(bundle) == []


def test_a_traffic_class_counts_where_the_host_has_them_and_is_refused_elsewhere(bundle: Bundle) -> None:
    bundle.linux["resources"]["network"] = {"classID": 7}
    hierarchy = cgroups.discover().find("net_cls")
    if hierarchy is None:
        assert "net_cls" in bundle.refuses("true")
    else:
        bundle.script("sleep 100").up()
        directory = Path(cgroups.discover().directory(hierarchy, bundle.cgroup))
        assert (directory / "net_cls.classid").read_text() == "7\n"
        assert (directory / "cgroup.procs").read_text().split() == [str(bundle.state()["pid"])]
        bundle.ok("delete", "--force", bundle.name)
    assert leftovers(bundle) == []


def test_a_cache_allocation_is_refused_by_name(bundle: Bundle) -> None:
    bundle.linux["intelRdt"] = {"closID": "x"}
    assert "linux.intelRdt" in bundle.refuses("true")


def test_without_a_path_a_container_gets_a_group_of_its_own(bundle: Bundle) -> None:
    del bundle.linux["cgroupsPath"]
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "cgroup"]
    own = f"/system.slice/nacre-runc-{bundle.name}.scope" if SYSTEMD else f"/nacre-runc-{bundle.name}"
    assert own in bundle.says("cat /proc/self/cgroup")
    layout = cgroups.discover()
    assert not [one for one in layout.hierarchies if os.path.exists(layout.directory(one, own))]


def test_a_cgroup_namespace_hides_where_the_container_lies(bundle: Bundle) -> None:
    assert bundle.cgroup not in bundle.says("cat /proc/self/cgroup /proc/self/mountinfo")


def test_groups_that_the_container_makes_below_its_own_go_with_it(bundle: Bundle) -> None:
    bundle.process["capabilities"] = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "permitted", "effective")}
    next(one for one in bundle.config["mounts"] if one["type"] == "cgroup")["options"] = ["rw"]
    place = "/sys/fs/cgroup" + ("" if cgroups.discover().mode == "v2" else "/pids")
    bundle.up(f"mkdir {place}/below; echo 0 > {place}/below/cgroup.procs; sleep 100")
    bundle.ok("delete", "--force", bundle.name)
    assert leftovers(bundle) == []


@pytest.mark.parametrize("path", ["/", "..", "/../..", "a/..", "/x/../y"])
def test_a_path_out_of_the_containers_own_group_is_refused(bundle: Bundle, path: str) -> None:
    """delete kills what is in the group: for "/" that would be everybody."""
    bundle.linux["cgroupsPath"] = path
    assert "linux.cgroupsPath" in bundle.refuses("true")


@pytest.mark.parametrize("act", ["kill", "remove", "freeze"])
def test_the_root_of_a_hierarchy_is_never_acted_on(act: str) -> None:
    layout = cgroups.Layout(hierarchies=())  # none: should the guard be gone, nothing is hit
    with pytest.raises(cgroups.CgroupBusy, match="every process of this machine"):
        getattr(cgroups.Cgroup(layout, "/"), act)()


@pytest.mark.parametrize("above", [False, True], ids=["itself", "parent"])
def test_a_frozen_group_is_refused_and_nobody_waits_in_it(bundle: Bundle, above: bool) -> None:
    hierarchy = cgroups.discover("freezer").need("freezer", "test")
    frozen = Path(f"{hierarchy.mount}{bundle.cgroup}")
    if above:
        bundle.linux["cgroupsPath"] = f"{bundle.cgroup}/below"
    frozen.mkdir(parents=True)
    state, yes, no = ("freezer.state", "FROZEN", "THAWED") if hierarchy.version == 1 else ("cgroup.freeze", "1", "0")
    (frozen / state).write_text(yes)
    try:
        assert "is frozen" in bundle.refuses("true")
    finally:
        (frozen / state).write_text(no)
        frozen.rmdir()


def test_a_group_that_holds_others_is_not_shared(bundle: Bundle) -> None:
    group = cgroups.Cgroup(cgroups.discover(), bundle.cgroup)
    group.create()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    group.join(pid)
    assert f"holds processes {pid}" in bundle.refuses("true")
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0, "it lives on"
    group.remove()


def test_who_forks_all_the_time_is_killed_to_the_last_without_cgroup_kill(bundle: Bundle) -> None:
    """Each process is gone as soon as it has a child, so that a list of them is old when it is read."""
    old = cgroups.Layout(hierarchies=tuple(one for one in cgroups.discover().hierarchies if one.version == 1))
    if old.find("freezer") is None:
        pytest.skip("cgroup.kill does it on pure v2")
    group = cgroups.Cgroup(old, bundle.cgroup)
    group.create()
    group.apply({"pids": {"limit": 40}})
    try:
        for _ in range(30):
            _start_runaway(group)
            group.kill()
            assert _all_end(group), group.pids()
    finally:
        while not _all_end(group):
            group.kill()
        group.remove()
        group.undo()


def _start_runaway(group: cgroups.Cgroup) -> None:
    read, write = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(write)
        os.read(read, 1)
        while True:
            try:
                if os.fork():
                    os._exit(0)
            except OSError:  # the limit
                continue
    os.close(read)
    group.join(first)
    os.close(write)
    os.waitpid(first, 0)


def _all_end(group: cgroups.Cgroup) -> bool:
    """Nobody is left once those who are killed have had time to die; a runaway would have a new number each time."""
    ends = time.monotonic() + 5
    seen = group.pids()
    while seen and time.monotonic() < ends:
        select.select([], [], [], 0.001)
        now = group.pids()
        if set(now) - set(seen):
            return False
        seen = now
    return not seen
