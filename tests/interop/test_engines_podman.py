"""Debian's podman with nacre-runc as its runtime."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines_support import IMAGE, MANAGER, Engine, engine, environment, found, group, on_a_terminal

from nacre.linux import cgroups

LIMITS = (
    "/sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    if cgroups.discover().mode == "v2"
    else "/sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max"
)


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(tmp_path_factory.mktemp("podman")) as one:
        yield one


@pytest.fixture
def up(podman: Engine) -> Iterator[str]:
    """The name of a container that runs."""
    podman.up("up")
    try:
        yield "up"
    finally:
        podman("rm", "-f", "-t", "0", "up")


def test_a_container_runs_execs_and_ends_with_its_own_exit_code(podman: Engine) -> None:
    words = ("run", "--rm", "--network", "none", "--cgroup-parent", group(podman.place), IMAGE)
    assert podman.call(*words, "sh", "-c", "exit 42").returncode == 42
    podman.up("job", script="echo begun; trap 'exit 5' TERM; while :; do sleep 0.1; done")
    try:
        assert podman("inspect", "job", "--format", "{{.OCIRuntime}} {{.State.Status}}") == "nacre running"
        assert podman.call("exec", "job", "sh", "-c", "exit 7").returncode == 7
        podman("stop", "-t", "20", "job")
        assert podman("inspect", "job", "--format", "{{.State.ExitCode}}") == "5"
        assert podman("logs", "job") == "begun"
    finally:
        podman("rm", "-f", "-t", "0", "job")


@pytest.mark.slow
def test_a_program_that_cannot_be_executed_ends_with_the_code_that_says_why(podman: Engine, up: str) -> None:
    words = ("run", "--rm", "--network", "none", "--cgroup-parent", group(podman.place), IMAGE)
    for program, code in (("nowhere", 127), ("/bin/nowhere", 127), ("/etc", 126)):
        assert (podman.call(*words, program).returncode, podman.call("exec", up, program).returncode) == (code, code), program


def test_a_program_in_no_format_of_the_kernels_ends_with_126_and_is_told_why_in_exec(
    podman: Engine, up: str, tmp_path: Path
) -> None:
    """runc leaves 1, which could be the program's own."""
    (tmp_path / "tool").write_text("true\n")
    (tmp_path / "tool").chmod(0o755)
    words = ("run", "--rm", "--network", "none", "--cgroup-parent", group(podman.place), "-v", f"{tmp_path}:/mnt", IMAGE)
    done = podman.call(*words, "/mnt/tool")
    assert done.returncode == 126 and "exec format error" in done.stderr
    podman("exec", up, "sh", "-c", "echo true >/tool; chmod 755 /tool")
    done = podman.call("exec", up, "/tool")
    assert done.returncode not in (0, 1) and "exec format error" in done.stderr


@pytest.mark.slow
def test_exec_with_a_terminal_has_one_of_the_containers_own(podman: Engine, up: str) -> None:
    words = [found("podman"), "exec", "-it", up, "sh", "-c", "tty; test -t 0 && echo interactive"]
    assert on_a_terminal(words, environment(podman.place)) == [b"/dev/pts/0", b"interactive"]


@pytest.mark.slow
def test_a_paused_container_stands_still_until_it_is_resumed(podman: Engine, up: str) -> None:
    podman("pause", up)
    assert podman("inspect", up, "--format", "{{.State.Status}}") == "paused"
    assert podman.call("exec", up, "true").returncode != 0
    podman("unpause", up)
    assert podman("exec", up, "echo", "goes on") == "goes on"


@pytest.mark.slow
def test_stats_top_and_update_see_its_cgroup(podman: Engine, up: str) -> None:
    figures = json.loads(podman("stats", "--no-stream", "--format", "json", up))
    assert figures[0]["pids"] == "1" and figures[0]["mem_usage"].startswith(tuple("123456789"))
    assert "sleep 1000" in podman("top", up)
    podman("update", "--memory", "64m", up)
    assert podman("exec", up, "sh", "-c", f"cat {LIMITS}").split()[0] == str(64 << 20)


@pytest.mark.slow
def test_volumes_binds_and_tmpfs_are_what_they_were_asked_to_be(podman: Engine, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host")
    podman("volume", "create", "kept")
    script = (
        "echo kept > /kept/f; cat /host/given; echo x > /scratch/f; echo x > /host/f || echo read-only; echo x > /f || echo too"
    )
    options = ("-v", "kept:/kept", "-v", f"{tmp_path}:/host:ro", "--tmpfs", "/scratch", "--read-only")
    assert podman.run(*options, IMAGE, "sh", "-c", script) == "from the hostread-only\ntoo"
    assert podman.run("-v", "kept:/kept", IMAGE, "cat", "/kept/f") == "kept"


@pytest.mark.slow
def test_the_containers_of_a_pod_share_its_namespaces(podman: Engine) -> None:
    podman(
        "pod",
        "create",
        "--name",
        "pod",
        "--network",
        "none",
        "--cgroup-parent",
        group(podman.place),
        "--share",
        "net,ipc,uts,pid",
    )
    podman("run", "-d", "--pod", "pod", "--name", "first", IMAGE, "sleep", "1000")
    seen = podman("run", "--rm", "--pod", "pod", IMAGE, "sh", "-c", "hostname; readlink /proc/1/exe; ps").split()
    assert seen[:2] == ["pod", "/catatonit"] and "1000" in seen  # the infra container's init, the other one's sleep
    podman("pod", "stop", "-t", "0", "pod")
    podman("pod", "rm", "-f", "pod")


@pytest.mark.slow
def test_a_health_check_is_an_exec_with_an_answer(podman: Engine) -> None:
    podman.up("sick", "--health-cmd", "test -e /well || exit 1", "--health-interval", "disable", "--health-retries", "1")
    assert podman.call("healthcheck", "run", "sick").returncode == 1
    podman("exec", "sick", "touch", "/well")
    assert podman.call("healthcheck", "run", "sick").returncode == 0
    podman("rm", "-f", "-t", "0", "sick")


@pytest.mark.slow
def test_a_user_namespace_maps_the_containers_root_to_nobody_of_the_host(podman: Engine) -> None:
    options = ("--uidmap", "0:100000:2000", "--gidmap", "0:100000:2000")
    said = podman.run(*options, IMAGE, "sh", "-c", "id -u; cat /proc/self/uid_map; touch /tmp/mine && stat -c %u /tmp/mine")
    assert said.split() == ["0", "0", "100000", "2000", "0"]
    podman.up("mapped", *options)
    pid = podman("inspect", "mapped", "--format", "{{.State.Pid}}")
    assert os.stat(f"/proc/{pid}").st_uid == 100000
    assert podman("exec", "--user", "1000", "mapped", "id", "-u") == "1000"
    podman("rm", "-f", "-t", "0", "mapped")


@pytest.mark.slow
def test_limits_capabilities_and_seccomp_reach_the_process(podman: Engine) -> None:
    script = f"cat {LIMITS}; grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status"
    options = (
        "--memory",
        "64m",
        "--pids-limit",
        "20",
        "--cap-drop",
        "all",
        "--cap-add",
        "kill",
        "--security-opt",
        "no-new-privileges",
    )
    said = podman.run(*options, IMAGE, "sh", "-c", script).split()
    assert said == [str(64 << 20), "20", "CapEff:", f"{1 << 5:016x}", "NoNewPrivs:", "1", "Seccomp:", "2"]


@pytest.mark.slow
def test_an_init_of_podmans_is_pid_1_and_a_host_network_is_the_hosts(podman: Engine) -> None:
    assert podman.run("--init", IMAGE, "cat", "/proc/1/cmdline").startswith("/run/podman-init")
    said = podman(
        "run", "--rm", "--network", "host", "--cgroup-parent", group(podman.place), IMAGE, "readlink", "/proc/self/ns/net"
    )
    assert said == os.readlink("/proc/self/ns/net")


@pytest.mark.slow
def test_kube_play_brings_up_a_manifest_and_takes_it_down(podman: Engine, tmp_path: Path) -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "played"},
        "spec": {
            "hostNetwork": True,
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "c",
                    "image": IMAGE,
                    "imagePullPolicy": "Never",
                    "command": ["sh", "-c", "id -u; sleep 1000"],
                    "securityContext": {"runAsUser": 1000},
                }
            ],
        },
    }
    path = tmp_path / "pod.yaml"
    path.write_text(json.dumps(manifest))
    podman("kube", "play", str(path))
    assert podman("logs", "played-c") == "1000"
    podman("kube", "down", str(path))


@pytest.mark.slow
def test_the_runtime_named_on_the_command_line_is_used_and_its_words_reach_the_user(podman: Engine) -> None:
    words = ("--runtime", str(podman.place / "runtime"), "run", "--rm", "--network", "none")
    words = (*words, "--cgroup-parent", group(podman.place), IMAGE)
    assert podman(*words, "echo", "so") == "so"
    done = podman.call(*words, "no-such-command")
    assert done.returncode == 127 and "no-such-command" in done.stderr and "executable file not found in $PATH" in done.stderr


@pytest.mark.skipif(MANAGER != "systemd", reason="takes a machine whose root filesystem has a systemd")
def test_a_systemd_runs_in_a_container_and_ends_when_it_is_stopped(podman: Engine, tmp_path: Path) -> None:
    subprocess.run(["mount", "--bind", "/", str(tmp_path)], check=True)
    try:
        options = ("--network", "none", "--cgroup-parent", group(podman.place), "--systemd", "always", "--stop-timeout", "120")
        words = ("--rootfs", f"{tmp_path}:O", "/lib/systemd/systemd", "--unit=basic.target")
        podman("run", "-d", "--name", "machine", *options, *words)
        active = ("timeout", "240", "sh", "-c", "until systemctl is-active basic.target; do sleep 1; done")
        assert podman("exec", "machine", *active).splitlines()[-1] == "active"
        assert podman("exec", "machine", "cat", "/proc/1/cgroup") == "0::/init.scope"
        podman("stop", "machine")
        assert podman("inspect", "machine", "--format", "{{.State.ExitCode}}") == "0"
    finally:
        podman("rm", "-f", "-t", "0", "machine")
        subprocess.run(["umount", str(tmp_path)], check=True)
