"""Run in a machine as an ordinary user whose own systemd runs: a container as a scope of that, limited, entered and gone again.

Prints a line for each thing proven, ends with an AssertionError at the first that is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host"))

import runc_support

from nacre.runc import templates

ROOT = f"{os.environ['XDG_RUNTIME_DIR']}/containers"
CGROUPS = Path("/sys/fs/cgroup")
FORKS = "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done"


def runc(*words: str) -> str:
    command = [runc_support.RUNC, "--root", ROOT, "--systemd-cgroup", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def detached(directory: Path, *words: str) -> None:
    """What goes on with our descriptors: files, as a pipe would be waited for."""
    with (directory / "out").open("w") as out:
        command = [runc_support.RUNC, "--root", ROOT, "--systemd-cgroup", *words]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=240, check=False).returncode
    assert code == 0, (directory / "out").read_text()


def start(directory: Path, cgroup: str) -> Path:
    """A container of this bundle, and its cgroup as the kernel has it."""
    config = templates.spec(rootless=True)
    config["process"] |= {"terminal": False, "args": ["sleep", "1000"], "env": ["PATH=/bin"], "rlimits": []}
    config["linux"] |= {"cgroupsPath": cgroup, "resources": {"memory": {"limit": 48 << 20}, "pids": {"limit": 8}}}
    (directory / "config.json").write_text(json.dumps(config))
    detached(directory, "run", "-d", "-b", str(directory), "one")
    pid = json.loads(runc("state", "one"))["pid"]
    return CGROUPS / Path(f"/proc/{pid}/cgroup").read_text().partition("0::/")[2].strip()


def until(what: str, path: Path, *, there: bool) -> None:
    deadline = time.monotonic() + 30
    while path.exists() != there:
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ["XDG_RUNTIME_DIR"]) as name:
        directory = Path(name)
        runc_support.fill(directory / "rootfs")
        group = start(directory, "user.slice:probe:one")
        manager = CGROUPS / "system.slice/mine.service"
        assert group == manager / "user.slice/probe-one.scope", group
        print("PLACED in the user's own manager")
        assert (group / "memory.max").read_text().strip() == str(48 << 20)
        assert (group / "pids.max").read_text().strip() == "8"
        shown = subprocess.run(
            ["systemctl", "--user", "show", "-p", "TasksMax,MemoryMax", "probe-one.scope"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"MemoryMax={48 << 20}" in shown and "TasksMax=8" in shown, shown
        print("LIMITED by systemd and in the files")
        detached(directory, "exec", "-d", "one", "sh", "-c", f"{FORKS}; sleep 100")
        deadline = time.monotonic() + 60
        while "can't fork" not in (told := (directory / "out").read_text()):  # which ends that shell
            assert time.monotonic() < deadline, told
            time.sleep(0.1)
        print("ENTERED by exec, and the limit is felt")
        runc("update", "--pids-limit", "20", "one")
        assert (group / "pids.max").read_text().strip() == "20"
        runc("pause", "one")
        assert (group / "cgroup.freeze").read_text().strip() == "1"
        runc("resume", "one")
        runc("delete", "--force", "one")
        until("the scope is gone", group, there=False)
        print("GONE after delete")
        group = start(directory, "")
        assert group == manager / "user.slice/nacre-runc-one.scope", group
        runc("delete", "--force", "one")
        print("NAMED by itself")


main()
