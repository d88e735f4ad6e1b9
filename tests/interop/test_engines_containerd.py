"""Debian's containerd with nacre-runc for its shim io.containerd.runc.v2, by ctr and by its CRI."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines_support import MANAGER, RUNTIME, environment, found

from nacre.cli.bench import drive, engine, peer
from nacre.wire import cri_pb2

SLICE = "nacrebench.slice" if MANAGER == "systemd" else ""


@pytest.fixture(scope="module")
def containerd() -> Iterator[engine.Engine]:
    with pytest.MonkeyPatch.context() as patch, engine.workplace() as place:
        patch.setenv("PYTHONPYCACHEPREFIX", environment(Path(place))["PYTHONPYCACHEPREFIX"])
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        with peer.containerd(place, engine.build_image(place), runtime=str(RUNTIME), slice=SLICE) as made:
            yield made


def ctr(containerd: engine.Engine, *words: str) -> subprocess.CompletedProcess[str]:
    command = [found("ctr"), "--address", containerd.socket, "--namespace", "k8s.io", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, stdin=subprocess.DEVNULL)


def options(name: str) -> tuple[str, ...]:
    """Of `ctr run`: the runtime and a cgroup."""
    if SLICE:
        return ("--runc-binary", str(RUNTIME), "--runc-systemd-cgroup", "--cgroup", f"{SLICE}:ctr:{name}")
    return ("--runc-binary", str(RUNTIME), "--cgroup", f"{engine.CGROUP}/containerd/{name}")


def run(containerd: engine.Engine, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return ctr(containerd, "run", "--rm", *options(name), engine.IMAGE, name, *words)


def test_a_pod_by_cri_comes_up_executes_and_goes(containerd: engine.Engine) -> None:
    pod = drive.Pod(containerd)
    pod.up()
    try:
        status = containerd.runtime.ContainerStatus(cri_pb2.ContainerStatusRequest(container_id=pod.container)).status
        assert status.state == cri_pb2.CONTAINER_RUNNING
        pod.execute()
        if SLICE:
            groups = [path.read_text() for path in Path("/sys/fs/cgroup", SLICE).glob("cri-containerd-*.scope/cgroup.procs")]
            assert len(groups) == 2 and all(groups), "of the sandbox and its container, each with a process"
        request = cri_pb2.ExecSyncRequest(container_id=pod.container, cmd=["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])
        answer = containerd.runtime.ExecSync(request)
        assert (answer.exit_code, answer.stdout, answer.stderr) == (3, b"out\n", b"err\n")
    finally:
        pod.down()


@pytest.mark.slow
def test_ctr_runs_a_container_and_gets_its_output_and_exit_code(containerd: engine.Engine) -> None:
    done = run(containerd, "greets", "/bin/sh", "-c", "echo hello; exit 6")
    assert (done.returncode, done.stdout) == (6, "hello\n")


@pytest.mark.slow
def test_ctr_executes_pauses_and_kills(containerd: engine.Engine) -> None:
    assert ctr(containerd, "run", "-d", *options("task"), engine.IMAGE, "task", "/bin/sleep", "1000").returncode == 0
    try:
        assert ctr(containerd, "task", "exec", "--exec-id", "one", "task", "/bin/true").returncode == 0
        assert ctr(containerd, "task", "pause", "task").returncode == 0
        assert "PAUSED" in ctr(containerd, "task", "ls").stdout
        assert ctr(containerd, "task", "resume", "task").returncode == 0
        assert len(ctr(containerd, "task", "ps", "task").stdout.splitlines()) == 2
        metrics = ctr(containerd, "task", "metrics", "task")
        assert "pids.current" in metrics.stdout, metrics
    finally:
        ctr(containerd, "task", "kill", "-s", "KILL", "task")
        ctr(containerd, "task", "delete", "task")
        assert ctr(containerd, "container", "delete", "task").returncode == 0


@pytest.mark.slow
def test_a_command_that_does_not_exist_is_named_in_containerds_error(containerd: engine.Engine) -> None:
    done = run(containerd, "nothing", "/bin/no-such-command")
    assert done.returncode != 0 and "/bin/no-such-command" in done.stderr
