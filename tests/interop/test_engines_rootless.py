"""podman as an ordinary user, with ids from /etc/subuid and no cgroup of its own, over nacre-runc."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines_support import IMAGE, MANAGER, PEERS, RUNTIME, environment, found, image, settle

pytestmark = pytest.mark.slow
USER = 4322
NETLESS = ("--network", "none")
SESSION = (
    f"/run/user/{USER}" if MANAGER == "systemd" else ""
)  # of a systemd of the user's own, which the machine's job has started


class Ordinary:
    """A user made for the test: passwd, group, subuid and subgid are bound over /etc in a mount namespace of each call's own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        settle(place)
        image(place)
        for name in ("tools", "run"):
            (place / name).mkdir(mode=0o755)
        for name in ("newuidmap", "newgidmap"):
            source = next(one for one in (Path("/usr/bin", name), PEERS / "usr/bin" / name) if one.exists())
            os.chmod(shutil.copy(source, place / "tools"), 0o4755)
        for name, text in (("passwd", f"mine:x:{USER}:{USER}::{place}/home:/bin/sh"), ("group", f"mine:x:{USER}:")):
            (place / name).write_text(Path("/etc", name).read_text() + text + "\n")
        for name in ("subuid", "subgid"):
            (place / name).write_text("mine:400000:65536\n")
        for one in (place, *(one for one in place.rglob("*") if one.parent != place / "tools")):
            os.chown(one, USER, USER, follow_symlinks=False)

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        binds = [f"mount --bind {self.place}/{name} /etc/{name}" for name in ("passwd", "group", "subuid", "subgid")]
        drop = f'exec setpriv --reuid {USER} --regid {USER} --clear-groups "$@"'
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", "\n".join([*binds, drop]), "sh", *words],
            env=environment(self.place)
            | {
                "PATH": f"{self.place}/tools:{os.environ['PATH']}",
                "XDG_RUNTIME_DIR": SESSION or f"{self.place}/run",
                "PYTHONPYCACHEPREFIX": "",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd="/",
        )

    def podman(self, *words: str) -> str:
        done = self.call(found("podman"), *words)
        assert done.returncode == 0, f"podman {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def processes(self) -> list[str]:
        """Those that have not ended; whether process 1 has reaped one that has is its affair."""
        owners = (USER, *range(400000, 465536))
        found = [one for one in Path("/proc").iterdir() if one.name.isdigit() and _owner_alive(one) in owners]
        return [one.name for one in found if not (SESSION and _is_a_service(one))]


def _owner_alive(process: Path) -> int:
    try:
        ended = "\nState:\tZ" in (process / "status").read_text()
        return -1 if ended else process.stat().st_uid
    except (FileNotFoundError, ProcessLookupError):
        return -1


def _is_a_service(process: Path) -> bool:
    """The user's systemd, the bus that it starts for podman, or nobody any more."""
    try:
        return (process / "cgroup").read_text().strip().endswith(("/init.scope", ".service"))
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Ordinary]:
    place = Path(tempfile.mkdtemp(prefix="nacre-rootless-"))  # pytest's own directories are root's alone
    place.chmod(0o755)
    try:
        yield from _podman(Ordinary(place))
    finally:
        shutil.rmtree(place)


def _podman(made: Ordinary) -> Iterator[Ordinary]:
    if made.call("test", "-x", str(RUNTIME)).returncode:
        pytest.skip(f"{RUNTIME} cannot be reached by an ordinary user here")
    try:
        made.podman("load", "-i", f"{made.place}/image.tar")
        yield made
    finally:
        made.call(found("podman"), "rm", "--all", "--force", "--time", "0")
        made.call(found("podman"), "system", "migrate")  # ends the process that holds its namespaces
        left = made.processes()
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
    assert left == []


def test_a_container_runs_as_its_users_root_and_as_granted_ids(ordinary: Ordinary) -> None:
    told = ordinary.podman("run", "--rm", *NETLESS, IMAGE, "sh", "-c", "id -u; cat /proc/self/uid_map")
    assert told.split() == f"0 0 {USER} 1 1 400000 65536".split()
    assert ordinary.podman("run", "--rm", *NETLESS, "--user", "7:8", IMAGE, "id").startswith("uid=7")
    assert ordinary.podman("run", "--rm", *NETLESS, "--userns", "keep-id", IMAGE, "id", "-u") == str(USER)


def test_a_container_is_entered_read_stopped_and_removed(ordinary: Ordinary) -> None:
    ordinary.podman("run", "-d", "--name", "one", *NETLESS, IMAGE, "sh", "-c", "echo hello; exec sleep 1000")
    assert ordinary.podman("exec", "--user", "5:6", "one", "sh", "-c", "id -u; ps | wc -l").split()[0] == "5"
    assert ordinary.podman("logs", "one") == "hello"
    ordinary.podman("stop", "--time", "0", "one")
    assert ordinary.podman("inspect", "one", "--format", "{{.State.ExitCode}}") == "137"
    ordinary.podman("rm", "one")


def test_a_pod_shares_its_namespaces(ordinary: Ordinary) -> None:
    infra = ("--infra-image", IMAGE, "--infra-command", "sleep 1000")
    ordinary.podman("pod", "create", "--name", "two", *NETLESS, *infra)
    first, second = (ordinary.podman("run", "--rm", "--pod", "two", IMAGE, "readlink", "/proc/self/ns/uts") for _ in range(2))
    assert first == second != os.readlink("/proc/self/ns/uts")
    ordinary.podman("pod", "rm", "--force", "--time", "0", "two")


def test_a_failing_program_and_a_missing_one_are_told_apart(ordinary: Ordinary) -> None:
    assert ordinary.call(found("podman"), "run", "--rm", *NETLESS, IMAGE, "sh", "-c", "exit 7").returncode == 7
    missing = ordinary.call(found("podman"), "run", "--rm", *NETLESS, IMAGE, "no-such-program")
    assert missing.returncode == 127 and "executable file not found" in missing.stderr


@pytest.mark.skipif(MANAGER != "systemd", reason="the user's own systemd has to make the cgroups")
def test_limits_hold_in_a_scope_of_the_users_own_systemd(ordinary: Ordinary) -> None:
    limits = ("--memory", "64m", "--pids-limit", "20")
    ordinary.podman("run", "-d", "--name", "limited", *NETLESS, *limits, IMAGE, "sleep", "1000")
    pid = ordinary.podman("inspect", "limited", "--format", "{{.State.Pid}}")
    scope = Path("/proc", pid, "cgroup").read_text().partition("0::/")[2].strip()
    assert "/user.slice/libpod-" in scope
    group = Path("/sys/fs/cgroup", scope)
    assert [(group / name).read_text().strip() for name in ("memory.max", "pids.max")] == [str(64 << 20), "20"]
    assert ordinary.podman("stats", "--no-stream", "--format", "{{.PIDs}}", "limited") == "1"
    ordinary.podman("pause", "limited")
    ordinary.podman("unpause", "limited")
    ordinary.podman("rm", "--force", "--time", "0", "limited")
    assert not group.exists()
