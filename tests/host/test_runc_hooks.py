"""Hooks: each at its moment, with the state on stdin, in time; what a failing one does (config.md "POSIX-platform Hooks")."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runc_support import Bundle, environment, leftovers, made
from test_runc_seccomp import profile, rule

from nacre.linux.namespaces import identity

POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def hook(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]} | more


def record(bundle: Bundle, point: str) -> dict[str, Any]:
    """A hook that appends its name and stdin to a log; startContainer sees the container's root, the others the host's."""
    log = "/log" if point == "startContainer" else f"{bundle.rootfs}/log"
    return hook(
        f"printf '%s ' {point} >> {log}; cat >> {log}; echo >> {log}; readlink /proc/self/ns/mnt >> {log}; readlink /proc/self/ns/net >> {log}"
    )


def entries(bundle: Bundle) -> list[tuple[str, dict[str, Any], str, str]]:
    lines = (bundle.rootfs / "log").read_text().splitlines()
    found = []
    for index in range(0, len(lines), 3):
        point, _, state = lines[index].partition(" ")
        found.append((point, json.loads(state), lines[index + 1], lines[index + 2]))
    return found


def test_all_hooks_run_in_order_each_in_its_namespace_with_the_state_of_its_moment(bundle: Bundle) -> None:
    bundle.config["hooks"] = {point: [record(bundle, point)] for point in POINTS}
    bundle.config["annotations"] = {"a": "b"}
    bundle.script("echo program >> /log.program; exec sleep 100").create()
    points = [point for point, *_ in entries(bundle)]
    assert points == ["prestart", "createRuntime", "createContainer"] and not (bundle.rootfs / "log.program").exists()
    pid = bundle.state()["pid"]
    bundle.ok("start", bundle.name)
    network = f"net:[{identity('network', pid)[1]}]"
    bundle.ok("delete", "--force", bundle.name)
    found = entries(bundle)
    assert [point for point, *_ in found] == list(POINTS)
    host_mnt, host_net = os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/ns/net")
    for point, state, mnt, net in found:
        assert state["id"] == bundle.name and state["bundle"] == str(bundle.path) and state["annotations"] == {"a": "b"}
        inside = point in ("createContainer", "startContainer")
        assert state["pid"] == (1 if inside else 0 if point == "poststop" else pid), "as it is seen where the hook runs"
        assert (mnt != host_mnt, net) == (inside, network if inside else host_net), point
    statuses = {point: state["status"] for point, state, *_ in found}
    assert statuses == {
        "prestart": "created",
        "createRuntime": "created",
        "createContainer": "created",
        "startContainer": "created",
        "poststart": "running",
        "poststop": "stopped",
    }


def test_prestart_hooks_see_the_new_namespaces_of_the_pid_they_are_told(bundle: Bundle) -> None:
    """What network plugins of old do: move a link into the namespace of the state's pid."""
    script = f"""pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net > {bundle.path}/seen"""
    bundle.config["hooks"] = {"prestart": [hook(script)]}
    pid = bundle.up()
    assert (bundle.path / "seen").read_text().strip() == f"net:[{identity('network', pid)[1]}]"


def test_a_hook_gets_exactly_its_environment_and_arguments(bundle: Bundle) -> None:
    bundle.config["hooks"] = {
        "createRuntime": [
            {"path": "/usr/bin/env", "env": ["ONLY=this"]},
            hook(f"env > {bundle.path}/env; echo $0 >> {bundle.path}/env"),
        ]
    }
    bundle.config["hooks"]["createRuntime"][1]["env"] = ["X=y", "PATH=/bin:/usr/bin"]
    assert bundle.run("true").returncode == 0
    words = (bundle.path / "env").read_text().split()
    assert {"X=y", "PATH=/bin:/usr/bin", "sh"} <= set(words) and not any(word.startswith(("HOME=", "ONLY=")) for word in words)


def test_a_hook_without_an_environment_has_the_runtimes_and_one_in_the_container_the_containers(bundle: Bundle) -> None:
    """No host's program sees what an image says: LD_PRELOAD would be loaded into it (CVE-2025-23266)."""
    bundle.config["process"]["env"].append("LD_IMAGE=theirs")
    del (outside := hook(f"env > {bundle.path}/outside"))["env"], (inside := hook("env > /inside"))["env"]
    empty = hook(f"env > {bundle.path}/empty") | {"env": []}
    bundle.config["hooks"] = {"createContainer": [outside, empty], "startContainer": [inside]}
    bundle.script("true").write()
    bundle.ok("run", "-b", str(bundle.path), bundle.name, env=environment(CALLER="ours"))
    assert "CALLER=ours" in (text := (bundle.path / "outside").read_text()) and "LD_IMAGE" not in text
    assert "CALLER" not in (bundle.path / "empty").read_text() + (text := (bundle.rootfs / "inside").read_text())
    assert "LD_IMAGE=theirs" in text and "HOME=/root" in text


def test_a_hook_of_create_inside_begins_in_the_containers_root(bundle: Bundle) -> None:
    bundle.config["hooks"] = {"createContainer": [hook("touch ./made; pwd")], "startContainer": [hook("test -e /made")]}
    bundle.says("test -e /made")


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer"])
def test_a_failing_hook_of_create_undoes_everything_and_its_words_are_the_evidence(bundle: Bundle, point: str) -> None:
    bundle.config["hooks"] = {point: [hook("echo the disk is on fire >&2; exit 3"), hook(f"touch {bundle.path}/never")]}
    message = bundle.refuses("true")
    assert f"run the {point} hook /bin/sh" in message and "status 3" in message and "the disk is on fire" in message
    assert leftovers(bundle) == [] and not (bundle.path / "never").exists()


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer"])
def test_a_container_that_a_hook_ended_has_its_poststop_hooks_run_when_all_is_undone(bundle: Bundle, point: str) -> None:
    after = hook(f"cat >{bundle.path}/state; ls {bundle.root} >{bundle.path}/left; exit 1")
    bundle.config["hooks"] = {point: [hook("exit 3")], "poststop": [after, hook(f"touch {bundle.path}/second")]}
    told = bundle.refuses("true")
    state = json.loads((bundle.path / "state").read_text())
    assert (state["id"], state["status"], state["pid"]) == (bundle.name, "stopped", 0)
    assert (bundle.path / "left").read_text() == "" and (bundle.path / "second").exists()
    assert "run the poststop hook" in told, "its failing is told beside the first"


def test_a_create_that_no_hook_ended_runs_no_poststop_hook(bundle: Bundle) -> None:
    bundle.config["hooks"] = {"poststop": [hook(f"touch {bundle.path}/never")]}
    bundle.mount("/x", "no-such-filesystem", "none").refuses()
    assert not (bundle.path / "never").exists()


def test_since_version_1_3_a_failing_poststart_hook_fails_the_start_and_ends_the_container(bundle: Bundle) -> None:
    bundle.config["ociVersion"] = "1.3.0"
    bundle.config["hooks"] = {"poststart": [hook("exit 5"), hook(f"touch {bundle.path}/never")]}
    bundle.script("sleep 100").create()
    assert "run the poststart hook" in bundle.fails("start", bundle.name)
    assert bundle.state()["status"] == "stopped" and not (bundle.path / "never").exists()


def test_a_failing_start_container_hook_fails_the_start_and_ends_the_container(bundle: Bundle) -> None:
    bundle.config["hooks"] = {"startContainer": [hook("exit 4")]}
    bundle.script("touch /ran").create()
    assert "status 4" in bundle.fails("start", bundle.name)
    assert not (bundle.rootfs / "ran").exists()
    assert bundle.state()["status"] == "stopped"
    bundle.ok("delete", bundle.name)


OWN = """grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):' /proc/self/status; umask; pwd; ulimit -n
for one in /proc/self/ns/*; do readlink $one; done"""


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_start_container_hook_is_what_the_containers_process_is(bundle: Bundle, uid: int, no_new_privileges: bool) -> None:
    """It is a program of the image's: with the runtime's rights it would be the host's root."""
    bundle.process |= {"user": {"uid": uid, "gid": uid, "additionalGids": [7], "umask": 0o27}, "cwd": "/tmp"}
    bundle.process |= {"noNewPrivileges": no_new_privileges, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}]}
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat"))
    bundle.config["hooks"] = {"startContainer": [hook(f"({OWN}) >/mnt/hook")]}
    (bundle.rootfs / "mnt").chmod(0o777)
    ours = bundle.says(OWN)
    assert (bundle.rootfs / "mnt" / "hook").read_text() == ours and f"{uid}\t{uid}" in ours and "Seccomp:\t2" in ours


def test_a_start_container_hook_is_held_by_the_filter_and_a_filter_need_not_allow_what_running_it_takes(bundle: Bundle) -> None:
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_KILL_PROCESS", "mkdir", "mkdirat"))
    bundle.config["hooks"] = {"startContainer": [{"path": "/bin/mkdir", "args": ["mkdir", "/tmp/x"]}]}
    assert "run the startContainer hook /bin/mkdir: it was killed by SIGSYS" in bundle.refuses("true")
    waiting = ("clone", "clone3", "fork", "vfork", "wait4", "waitid", "memfd_create", "poll", "pidfd_open", "openat", "open")
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_KILL_PROCESS", *waiting))
    bundle.config["hooks"] = {"startContainer": [{"path": "/bin/true", "timeout": 9}]}
    assert bundle.args("echo", "alive").run().stdout == "alive\n"


@pytest.mark.parametrize("path", ["/no/such/hook", "/etc/passwd"])
def test_a_start_container_hook_that_cannot_be_executed_is_named(bundle: Bundle, path: str) -> None:
    bundle.config["hooks"] = {"startContainer": [{"path": path}]}
    bundle.script("touch /ran")
    assert f"run the startContainer hook {path}: execve(2) {path}: " in bundle.refuses() and not (bundle.rootfs / "ran").exists()


@pytest.mark.parametrize("point", ["poststart", "poststop"])
def test_a_failing_hook_after_the_fact_only_warns_and_the_rest_still_run(bundle: Bundle, tmp_path: Path, point: str) -> None:
    bundle.config["ociVersion"] = "1.2.1"
    bundle.config["hooks"] = {point: [hook("exit 5"), hook(f"touch {bundle.path}/second")]}
    bundle.script("true").write()
    bundle.ok("--log", str(tmp_path / "log"), "run", "-b", str(bundle.path), bundle.name)
    assert (bundle.path / "second").exists() and f"run the {point} hook" in (tmp_path / "log").read_text()


def test_a_hook_that_passes_its_time_is_killed(bundle: Bundle) -> None:
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}]}
    assert "did not end within 1 s and was killed" in bundle.refuses("true")


def test_a_hook_that_is_not_there_is_named(bundle: Bundle) -> None:
    bundle.config["hooks"] = {"prestart": [{"path": "/no/such/hook"}]}
    assert "/no/such/hook: No such file or directory" in bundle.refuses("true")


def test_a_hook_that_does_not_read_its_state_is_fine(bundle: Bundle) -> None:
    bundle.config["hooks"] = {point: [{"path": "/bin/true"}] for point in POINTS}
    assert bundle.run("true").returncode == 0
