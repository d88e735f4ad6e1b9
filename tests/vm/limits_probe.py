"""Run in a machine: a container's limits, seen in the kernel's files and felt by its processes, whatever the cgroup layout.

`python limits_probe.py [--systemd-cgroup]`: prints a line for each thing proven, ends with an AssertionError at the first that is not.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host"))

import runc_support

from nacre import runc
from nacre.linux import cgroup_files, cgroups, process
from nacre.linux.libc import owned
from nacre.oci import state

LAYOUT = cgroups.discover()
ROOT = "/run/limits-probe"
SYSTEMD = "--systemd-cgroup" in sys.argv
MIB = 1 << 20
LIMITS = {
    "memory": {"limit": 48 * MIB},
    "pids": {"limit": 8},
    "cpu": {"shares": 512, "quota": 20_000, "period": 100_000},
    "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "rw"}],
}
SCRIPT = """
head -c 1 /tmp/disk > /dev/null && echo disk read
head -c 0 /dev/null && echo null read
n=0; while [ $n -lt 3000 ]; do n=$((n+1)); done
( for n in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1 & done )
echo done
while :; do read forever < /tmp/pipe; done  # again when the end of a child interrupts it
"""


def bundle(directory: Path, script: str, resources: dict[str, Any]) -> Path:
    runc_support.fill(directory / "rootfs")
    config = runc_support.plain_config("probe.slice:probe:one" if SYSTEMD else "/probe/one")
    config["process"]["args"] = ["sh", "-c", script]
    config["linux"]["resources"] = resources
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def value(controller: str, v1: str, v2: str) -> str:
    """What the kernel has for the container `one`."""
    hierarchy = LAYOUT.need(controller, "read a limit")
    directory = LAYOUT.directory(hierarchy, state.read(ROOT, "one").cgroup)
    return cgroup_files.read(directory, v1 if hierarchy.version == 1 else v2).strip()


def wait_for(what: Callable[[], bool], pid: int) -> None:
    """Until `what`, or the end of process `pid`, which would have brought it about."""
    with owned(process.pidfd_open(pid)) as pidfd:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        for _ in range(600):
            if what() or poll.poll(100):
                return
    raise AssertionError("it never happened")


def start(directory: Path) -> runc.Launch:
    with open(directory / "out", "w") as out:
        launch = runc.create(ROOT, "one", str(directory), stdio=(None, out.fileno(), out.fileno()), systemd_cgroup=SYSTEMD)
    print("WARNINGS", launch.warnings)
    runc.start(ROOT, "one")
    return launch


def felt_and_seen(directory: Path) -> None:
    bundle(directory, SCRIPT, LIMITS)
    os.mknod(directory / "rootfs/tmp/disk", 0o600 | 0o060000, os.stat("/dev/vda").st_rdev)
    os.mkfifo(directory / "rootfs/tmp/pipe")
    launch = start(directory)
    assert value("memory", "memory.limit_in_bytes", "memory.max") == str(48 * MIB)
    assert value("pids", "pids.max", "pids.max") == "8"
    assert value("cpu", "cpu.cfs_quota_us", "cpu.max") in ("20000", "20000 100000")
    assert value("cpu", "cpu.shares", "cpu.weight") in ("512", "20")
    print("SEEN memory pids cpu")
    wait_for(lambda: "done" in (directory / "out").read_text(), launch.pid)
    said = (directory / "out").read_text()
    assert "can't fork" in said and "done" in said, said
    assert "disk read" not in said and "not permitted" in said and "null read" in said, said
    table = cgroup_files.table(value("cpu", "cpu.stat", "cpu.stat"))
    assert table["nr_throttled"] > 0, table
    print("FELT pids devices cpu")
    changed_and_frozen(launch.pid)


def changed_and_frozen(pid: int) -> None:
    runc.update(ROOT, "one", {"pids": {"limit": 20}, "memory": {"limit": 64 * MIB}})
    assert (value("pids", "pids.max", "pids.max"), value("memory", "memory.limit_in_bytes", "memory.max")) == (
        "20",
        str(64 * MIB),
    )
    runc.pause(ROOT, "one")
    assert (now := runc.state(ROOT, "one")["status"]) == "paused", (now, process.status(pid))
    runc.resume(ROOT, "one")
    assert pid in runc.processes(ROOT, "one")
    figures = runc.stats(ROOT, "one")
    assert figures["memory_bytes"] > 0 and figures["cpu_ns"] > 0 and figures["pids"] > 0, figures
    if SYSTEMD:
        shown = subprocess.run(
            ["systemctl", "show", "probe-one.scope", "-p", "TasksMax,MemoryMax,MemoryLimit,Delegate,DevicePolicy"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert "TasksMax=20" in shown and "Delegate=yes" in shown and "DevicePolicy=strict" in shown, shown
        assert f"={64 * MIB}" in shown, shown
        print("SHOWN by systemctl")
    runc.kill(ROOT, "one", 9, everyone=True)
    os.waitpid(pid, 0)
    gone("after kill")


def out_of_memory(directory: Path) -> None:
    bundle(directory, "exec dd if=/dev/zero of=/dev/null bs=100M count=1", {"memory": {"limit": 32 * MIB}})
    launch = start(directory)
    _, status = os.waitpid(launch.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (-9, 137), (code, (directory / "out").read_text())
    assert runc.oom_kills(ROOT, "one") > 0 or (SYSTEMD and LAYOUT.mode != "v2")
    print("FELT memory")
    gone("out of memory")


def gone(when: str) -> None:
    paths = [directory for _, directory in cgroups.Cgroup(LAYOUT, state.read(ROOT, "one").cgroup).directories()]
    runc.delete(ROOT, "one")
    left = [path for path in paths if os.path.exists(path)]
    assert not left, left
    if SYSTEMD:
        units = subprocess.run(
            ["systemctl", "list-units", "--all", "--no-legend", "probe*"], check=True, capture_output=True, text=True
        )
        assert "probe-one" not in units.stdout, units.stdout
    print(f"GONE {when}")


def by_command(directory: Path) -> None:
    """The same through the command line."""
    bundle(directory, "cat /proc/self/cgroup", LIMITS)
    command = ["nacre-runc", *(["--systemd-cgroup"] if SYSTEMD else []), "--root", ROOT, "run", "-b", str(directory), "two"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print("RUN by nacre-runc")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.dump_traceback_later(150, exit=True)  # a hang says where, before the machine's time is up
    process.set_child_subreaper()
    print("LAYOUT", LAYOUT.mode, "systemd" if SYSTEMD else "cgroupfs")
    for act in (felt_and_seen, out_of_memory, by_command):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
            act(Path(directory))


if __name__ == "__main__":
    main()
