"""Debian's docker with nacre-runc for its runtime; where docker is installed, which is in tests/vm/test_engines_systemd.py."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engines_support import CALL_S, IMAGE, MANAGER, RUNTIME, image, on_a_terminal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dockerd") is None, reason="docker is not installed"),
]


@dataclass(frozen=True, slots=True)
class Docker:
    """A daemon of the test's own, and its client."""

    place: Path

    def words(self, *words: str) -> list[str]:
        return ["docker", "--host", f"unix://{self.place}/socket", *words]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*words), capture_output=True, text=True, timeout=CALL_S, check=False, stdin=subprocess.DEVNULL
        )

    def __call__(self, *words: str) -> str:
        done = self.call(*words)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()


def _daemon(place: Path) -> list[str]:
    settings = {
        "data-root": f"{place}/data",
        "exec-root": f"{place}/exec",
        "pidfile": f"{place}/pid",
        "hosts": [f"unix://{place}/socket"],
        "exec-opts": [f"native.cgroupdriver={MANAGER}"],
        "iptables": False,
        "ip6tables": False,
        "bridge": "none",
        "runtimes": {"nacre": {"path": str(RUNTIME)}},
        "default-runtime": "nacre",
    }
    (place / "daemon.json").write_text(json.dumps(settings))
    return ["dockerd", "--config-file", f"{place}/daemon.json"]


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    place = tmp_path_factory.mktemp("docker")
    made = Docker(place)
    with (place / "log").open("wb") as log:
        daemon = subprocess.Popen(_daemon(place), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while made.call("version").returncode:  # which asks the daemon, and takes its time
            assert daemon.poll() is None, (place / "log").read_text()
        made("load", "-i", image(place))
        yield made
        left = made("ps", "--all", "--quiet").split()
        assert left == [], made("ps", "--all")
    finally:
        daemon.terminate()
        daemon.wait(timeout=CALL_S)


@pytest.fixture
def up(docker: Docker) -> Iterator[str]:
    """The name of a container that runs."""
    docker("run", "-d", "--name", "up", "--network", "none", IMAGE, "sleep", "1000")
    try:
        yield "up"
    finally:
        docker("rm", "--force", "up")


def test_a_container_runs_and_ends_with_its_own_exit_code(docker: Docker) -> None:
    assert docker("run", "--rm", "--network", "none", IMAGE, "echo", "hello") == "hello"
    assert docker.call("run", "--rm", "--network", "none", IMAGE, "sh", "-c", "exit 42").returncode == 42
    for program, code in (("nowhere", 127), ("/etc", 126)):
        done = docker.call("run", "--rm", "--network", "none", IMAGE, program)
        assert done.returncode == code and program in done.stderr, done


def test_it_is_entered_paused_looked_at_and_stopped(docker: Docker, up: str) -> None:
    assert docker.call("exec", up, "sh", "-c", "exit 7").returncode == 7
    assert docker("exec", "--user", "5:6", "--workdir", "/tmp", up, "sh", "-c", "id -u; pwd").split() == ["5", "/tmp"]
    docker("pause", up)
    assert docker("inspect", up, "--format", "{{.State.Status}}") == "paused"
    docker("unpause", up)
    assert "sleep 1000" in docker("top", up)
    assert docker("stats", "--no-stream", "--format", "{{.PIDs}}", up) == "1"
    docker("stop", "--time", "1", up)
    assert docker("inspect", up, "--format", "{{.State.ExitCode}}") == "137"
    docker("start", up)
    assert docker("exec", up, "echo", "again") == "again"


def test_exec_with_a_terminal_has_one_of_the_containers_own(docker: Docker, up: str) -> None:
    words = docker.words("exec", "-it", up, "sh", "-c", "tty; test -t 0 && echo interactive")
    assert on_a_terminal(words) == [b"/dev/pts/0", b"interactive"]


def test_limits_rights_and_mounts_are_what_they_were_asked_to_be(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host\n")
    limits = ("--memory", "64m", "--pids-limit", "20", "--cpus", "0.5")
    rights = ("--cap-drop", "all", "--cap-add", "kill", "--security-opt", "no-new-privileges", "--read-only", "--init")
    mounts = ("--volume", f"{tmp_path}:/host:ro", "--tmpfs", "/scratch", "--device", "/dev/zero:/dev/nought")
    docker("run", "-d", "--name", "bound", "--network", "none", *limits, *rights, *mounts, IMAGE, "sleep", "1000")
    try:
        files = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max"
        script = f"cat {files} /host/given; grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/1/status; stat -c %F /dev/nought"
        told = docker("exec", "bound", "sh", "-c", script).splitlines()
        assert told[:4] == [str(64 << 20), "20", "50000 100000", "from the host"]
        assert [line.split()[1] for line in told[4:7]] == [f"{1 << 5:016x}", "1", "2"]
        assert told[7] == "character special file"
        assert (
            docker.call("exec", "bound", "touch", "/f").returncode
            and not docker.call("exec", "bound", "touch", "/scratch/f").returncode
        )
        docker("update", "--memory", "80m", "--memory-swap", "80m", "bound")
        assert docker("exec", "bound", "cat", "/sys/fs/cgroup/memory.max") == str(80 << 20)
    finally:
        docker("rm", "--force", "bound")


@pytest.mark.skipif(not Path("/sys/module/apparmor").exists(), reason="the kernel has no AppArmor")
def test_a_container_is_confined_by_dockers_apparmor_profile_and_so_is_who_enters_it(docker: Docker, up: str) -> None:
    assert docker("exec", up, "cat", "/proc/1/attr/current") == "docker-default (enforce)"
    assert docker("exec", up, "cat", "/proc/self/attr/current") == "docker-default (enforce)"


def test_a_container_out_of_memory_is_said_to_be(docker: Docker) -> None:
    script = "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done"
    done = docker.call("run", "--name", "greedy", "--network", "none", "--memory", "16m", IMAGE, "sh", "-c", script)
    try:
        assert done.returncode == 137
        assert docker("inspect", "greedy", "--format", "{{.State.OOMKilled}}") == "true"
    finally:
        docker("rm", "greedy")


def test_a_privileged_container_sees_the_hosts_devices(docker: Docker) -> None:
    script = "ls /dev | grep -c . ; grep CapEff /proc/self/status; mount -t tmpfs t /tmp && echo mounted"
    told = docker("run", "--rm", "--privileged", "--network", "host", IMAGE, "sh", "-c", script).split()
    assert int(told[0]) > 30 and told[3] == "mounted"
