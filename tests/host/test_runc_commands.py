"""nacre-runc's command line: what engines call, in the words and with the exit codes that they expect (standards: OCI command line)."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest
from runc_support import CALL_S, Bundle, environment, leftovers, made

from nacre import __version__
from nacre.linux import cgroups
from nacre.linux.libc import owned
from nacre.linux.process import pidfd_open
from nacre.oci import spec
from nacre.runc import options


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def await_status(bundle: Bundle, wanted: str) -> None:
    """Callers poll `state`, and so does this."""
    deadline = time.monotonic() + CALL_S
    while bundle.state()["status"] != wanted:
        assert time.monotonic() < deadline, f"still {bundle.state()['status']}"


def test_a_container_goes_from_created_over_running_to_stopped_and_away(bundle: Bundle) -> None:
    bundle.config["annotations"] = {"who": "me"}
    bundle.script("echo hello; read line < /tmp/pipe; echo $line; exit 3")
    os.mkfifo(bundle.rootfs / "tmp" / "pipe")
    bundle.create("--pid-file", str(bundle.path / "pid"))
    state = bundle.state()
    assert state["status"] == "created" and state["bundle"] == str(bundle.path) and state["id"] == bundle.name
    assert state["annotations"] == {"who": "me"} and state["ociVersion"].startswith("1.")
    assert (bundle.path / "pid").read_text() == str(state["pid"]) and bundle.output() == ""
    bundle.ok("start", bundle.name)
    assert bundle.state()["status"] == "running"
    with (bundle.rootfs / "tmp" / "pipe").open("w") as pipe:
        pipe.write("done\n")
    await_status(bundle, "stopped")
    assert bundle.state()["pid"] == 0 and bundle.output() == "hello\ndone\n"
    bundle.ok("delete", bundle.name)
    assert leftovers(bundle) == []


def test_run_answers_with_the_programs_own_status(bundle: Bundle) -> None:
    assert bundle.run("exit 7").returncode == 7
    assert leftovers(bundle) == []
    assert bundle.run("sh -c 'kill -KILL $$'; exit $?").returncode == 128 + signal.SIGKILL


def test_run_takes_the_working_directory_as_bundle_and_a_relative_pid_file(bundle: Bundle) -> None:
    bundle.script("sleep 100").write()
    bundle.quietly("run", "--detach", "--pid-file", "here.pid", bundle.name, cwd=bundle.path)
    assert int((bundle.path / "here.pid").read_text()) == bundle.state()["pid"]


def test_run_passes_signals_on(bundle: Bundle) -> None:
    bundle.script("trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.05; done").write()
    running = subprocess.Popen(
        [*bundle.runtime, "--root", str(bundle.root), "run", "-b", str(bundle.path), bundle.name],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.stdout.read() == "got it\n" and running.wait() == 5
    running.stdout.close()


def test_run_with_keep_leaves_the_stopped_container(bundle: Bundle) -> None:
    bundle.script("true").write()
    bundle.ok("run", "--keep", "-b", str(bundle.path), bundle.name)
    assert bundle.state()["status"] == "stopped"
    bundle.ok("delete", bundle.name)


def test_a_second_container_of_the_same_id_is_refused_and_the_first_lives_on(bundle: Bundle) -> None:
    pid = bundle.up()
    message = bundle.fails("create", "--bundle", str(bundle.path), bundle.name)
    assert "the id is taken" in message and f"pid {pid}" in message
    assert bundle.state()["status"] == "running"


@pytest.mark.parametrize("command", ["state", "start", "kill", "delete", "exec", "pause", "resume", "ps", "update", "events"])
def test_an_unknown_container_is_an_error(bundle: Bundle, command: str) -> None:
    words = {"exec": ["true"], "events": []}.get(command, [])
    message = bundle.fails(
        command, *(["--stats"] if command == "events" else []), "nobody", *words, code=255 if command == "exec" else 1
    )
    assert "nobody" in message


@pytest.mark.parametrize("command", ["state", "start", "kill", "delete", "exec", "create", "run"])
def test_a_missing_id_is_an_error(bundle: Bundle, command: str) -> None:
    assert "id is missing" in bundle.fails(command, code=255 if command == "exec" else 1)


def test_delete_force_of_an_unknown_container_is_fine(bundle: Bundle) -> None:
    bundle.ok("delete", "--force", "nobody")


def test_delete_refuses_what_runs_and_force_ends_it(bundle: Bundle) -> None:
    pid = bundle.up("sleep 100 & sleep 101 & wait")
    pidfd = pidfd_open(pid)
    assert "it is running" in bundle.fails("delete", bundle.name)
    bundle.ok("delete", "--force", bundle.name)
    os.close(pidfd)
    assert leftovers(bundle) == []


def test_start_is_for_created_containers_only(bundle: Bundle) -> None:
    bundle.up()
    assert "it is running" in bundle.fails("start", bundle.name)


@pytest.mark.parametrize("word", ["KILL", "SIGKILL", "9", "kill"])
def test_kill_takes_signals_by_name_and_number(bundle: Bundle, word: str) -> None:
    bundle.up()
    bundle.ok("kill", bundle.name, word)
    await_status(bundle, "stopped")
    assert "container not running" in bundle.fails("kill", bundle.name, "KILL")


def test_kill_ends_a_container_that_was_never_started(bundle: Bundle) -> None:
    bundle.create()
    bundle.ok("kill", bundle.name, "KILL")
    await_status(bundle, "stopped")
    assert "it is stopped" in bundle.fails("start", bundle.name)
    bundle.ok("delete", bundle.name)


def test_kill_all_reaches_every_process_without_a_pid_namespace(bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "pid"]
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if one["destination"] != "/proc"]
    bundle.linux["maskedPaths"] = bundle.linux["readonlyPaths"] = []
    bundle.up("sleep 100 & sleep 100 & sleep 100")
    pids = json.loads(bundle.ok("ps", "--format", "json", bundle.name))
    assert len(pids) >= 2
    pidfds = [pidfd_open(pid) for pid in pids]
    bundle.ok("kill", "--all", bundle.name, "KILL")
    await_status(bundle, "stopped")
    bundle.ok("kill", "--all", bundle.name, "KILL")  # engines call it again to be sure
    bundle.ok("delete", bundle.name)
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 10)[0], "a pidfd is readable once its process has ended"
        os.close(pidfd)


@pytest.mark.parametrize("init", ["lives", "is gone"])
def test_sigkill_leaves_nobody_who_shares_the_hosts_pids(bundle: Bundle, init: str) -> None:
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "pid"]
    bundle.up("sleep 100 & exec sleep 100" if init == "lives" else "sleep 100 & exit 0")
    if init == "is gone":
        await_status(bundle, "stopped")
    pidfds = [pidfd_open(pid) for pid in json.loads(bundle.ok("ps", "--format", "json", bundle.name))]
    assert len(pidfds) == (2 if init == "lives" else 1)
    bundle.ok("kill", bundle.name, "KILL")
    for pidfd in pidfds:
        with owned(pidfd):
            assert select.select([pidfd], [], [], 10)[0]
    await_status(bundle, "stopped")
    assert "not running" in bundle.fails("kill", bundle.name, "KILL")


@pytest.mark.parametrize("word", ["TERM", "INT", "HUP"])
def test_a_created_container_is_ended_by_the_signals_that_end_programs(bundle: Bundle, word: str) -> None:
    bundle.script("exec sleep 100").create()
    bundle.ok("kill", bundle.name, word)
    await_status(bundle, "stopped")


def test_signal_0_asks_whether_the_container_runs(bundle: Bundle) -> None:
    bundle.up()
    bundle.ok("kill", bundle.name, "0")
    bundle.ok("kill", bundle.name, "KILL")
    await_status(bundle, "stopped")
    assert "not running" in bundle.fails("kill", bundle.name, "0")
    bundle.ok("kill", "--all", bundle.name, "0")


def test_delete_takes_what_init_left_behind_without_a_pid_namespace(bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "pid"]
    bundle.up("sleep 100 & exit 0")
    await_status(bundle, "stopped")
    assert json.loads(bundle.ok("ps", "--format", "json", bundle.name))
    bundle.ok("delete", bundle.name)
    assert leftovers(bundle) == []


def test_delete_takes_a_regular_expression(bundle: Bundle) -> None:
    bundle.create()
    bundle.ok("kill", bundle.name, "KILL")
    await_status(bundle, "stopped")
    bundle.ok("delete", "--regex", bundle.name[:-2] + "..")
    assert bundle.ok("list", "-q") == ""


def test_list_shows_a_table_ids_or_json(bundle: Bundle) -> None:
    assert bundle.ok("list").split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert bundle.ok("list", "--quiet") == "" and json.loads(bundle.ok("list", "-f", "json")) == []
    pid = bundle.up()
    _head, row = bundle.ok("list").splitlines()
    assert row.split()[:4] == [bundle.name, str(pid), "running", str(bundle.path)]
    assert bundle.ok("list", "-q") == f"{bundle.name}\n"
    (one,) = json.loads(bundle.ok("list", "--format", "json"))
    assert one["id"] == bundle.name and one["status"] == "running" and one["created"].endswith("Z")


def test_ps_shows_the_containers_processes_only(bundle: Bundle) -> None:
    pid = bundle.up("sleep 100 & sleep 101")
    pids = json.loads(bundle.ok("ps", "-f", "json", bundle.name))
    assert pid in pids and len(pids) == 2
    lines = bundle.ok("ps", bundle.name).splitlines()
    assert lines[0].split()[:2] == ["UID", "PID"] and len(lines) == 3
    assert [line.split()[0] for line in bundle.ok("ps", bundle.name, "-o", "pid").splitlines()[1:]] == [
        str(one) for one in sorted(pids)
    ]


def test_pause_stops_time_for_the_container_and_resume_goes_on(bundle: Bundle) -> None:
    bundle.up("while :; do echo x; sleep 0.01; done")
    bundle.ok("pause", bundle.name)
    assert bundle.state()["status"] == "paused"
    size = len(bundle.output())
    assert "it is paused" in bundle.fails("exec", bundle.name, "true", code=255)
    assert "it is paused" in bundle.fails("pause", bundle.name)
    assert "it is paused" in bundle.fails("delete", bundle.name)
    assert len(bundle.output()) == size
    bundle.ok("resume", bundle.name)
    assert bundle.state()["status"] == "running" and bundle.inside("echo alive") == "alive\n"
    assert "it is running" in bundle.fails("resume", bundle.name)


@pytest.mark.parametrize("how", ["kill", "delete"])
def test_a_paused_container_can_be_ended(bundle: Bundle, how: str) -> None:
    bundle.up("sleep 100 & wait")
    bundle.ok("pause", bundle.name)
    if how == "kill":
        bundle.ok("kill", bundle.name, "KILL")
        await_status(bundle, "stopped")
    bundle.ok("delete", *(["--force"] if how == "delete" else []), bundle.name)
    assert leftovers(bundle) == []


def test_events_answers_figures_once_when_asked_so(bundle: Bundle) -> None:
    bundle.linux["resources"]["pids"] = {"limit": 40}
    bundle.up("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 100")
    event = json.loads(bundle.ok("events", "--stats", bundle.name))
    assert event["type"] == "stats" and event["id"] == bundle.name
    assert event["data"]["pids"]["current"] >= 1 and event["data"]["pids"]["limit"] == 40
    assert event["data"]["memory"]["usage"]["usage"] > 0 and event["data"]["memory"]["raw"]["pgfault"] > 0
    assert event["data"]["cpu"]["usage"]["total"] > 0 and event["data"]["cpuset"]["cpus"]


def test_events_has_what_runcs_has(bundle: Bundle) -> None:
    runc = shutil.which("runc")
    if runc is None:
        pytest.skip("which('runc') is None: ./run test unpacks it")
    bundle.linux["resources"] |= {"memory": {"limit": 50 << 20}, "pids": {"limit": 40}}
    bundle.up("sleep 100")
    mine = json.loads(bundle.ok("events", "--stats", bundle.name))["data"]
    bundle.linux["cgroupsPath"] = f"/nacre-test-{bundle.name}"
    other = Bundle(**{**vars(bundle), "runtime": (runc,), "root": bundle.path / "runc-state"})
    other.up("sleep 100")
    try:
        theirs = json.loads(other.ok("events", "--stats", bundle.name))["data"]
    finally:
        other.call("delete", "--force", bundle.name)
    assert mine.keys() == theirs.keys()
    if "cpus" in theirs["cpuset"]:  # on v2 runc has no figures of it
        assert mine["cpuset"] == theirs["cpuset"]
    assert mine["cpu"]["usage"].keys() == theirs["cpu"]["usage"].keys()
    for group in ("usage", "raw"):
        assert mine["memory"][group].keys() == theirs["memory"][group].keys(), group
    assert mine["memory"]["usage"]["limit"] == theirs["memory"]["usage"]["limit"]
    assert mine["pids"]["limit"] == theirs["pids"]["limit"] and mine["pids"].keys() == theirs["pids"].keys()


def test_events_goes_on_until_the_container_ends_and_tells_of_memory_that_ran_out(bundle: Bundle) -> None:
    bundle.linux["resources"]["memory"] = {"limit": 32 << 20, "swap": 32 << 20}
    bundle.up("while [ ! -e /tmp/go ]; do sleep 0.05; done; (tail /dev/zero); while [ ! -e /tmp/end ]; do sleep 0.05; done")
    words = [*bundle.runtime, "--root", str(bundle.root), "events", "--interval", "100ms", bundle.name]
    told = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
    with told, cast("IO[str]", told.stdout) as lines:
        assert json.loads(lines.readline())["type"] == "stats"
        (bundle.rootfs / "tmp/go").touch()
        kinds = (json.loads(line)["type"] for line in lines)
        assert "oom" in kinds, "it ended without"
        (bundle.rootfs / "tmp/end").touch()
        assert set(kinds) <= {"stats"} and told.wait(10) == 0
    assert "it is not running" in bundle.fails("events", bundle.name)


def test_a_damaged_record_is_told_and_hides_no_other_container(bundle: Bundle) -> None:
    bundle.up("sleep 100")
    (bundle.root / "broken").mkdir()
    (bundle.root / "broken/state.json").write_text("{")
    done = bundle.call("list", "--quiet")
    assert (done.returncode, done.stdout) == (0, bundle.name + "\n")
    assert done.stderr.startswith("nacre-runc: read ") and "it is damaged" in done.stderr
    bundle.ok("delete", "--force", "broken")


def test_spec_writes_a_document_that_runs(bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "fresh"
    place.mkdir()
    bundle.ok("spec", cwd=place)
    assert "it exists" in bundle.fails("spec", "--bundle", str(place))
    document = json.loads((place / "config.json").read_text())
    assert document["process"]["args"] == ["sh"] and document["process"]["terminal"] is True
    document["process"] |= {"terminal": False, "args": ["echo", "it runs"]}
    document["root"]["path"] = str(bundle.rootfs)
    document["linux"]["cgroupsPath"] = bundle.cgroup
    (place / "config.json").write_text(json.dumps(document))
    assert bundle.ok("run", "-b", str(place), bundle.name) == "it runs\n"


def test_features_is_json_of_what_is_there(bundle: Bundle) -> None:
    features = json.loads(bundle.ok("features"))
    assert features["ociVersionMin"] == "1.0.0" and features["ociVersionMax"] == spec.VERSION == "1.3.0"
    assert features["linux"]["memoryPolicy"]["modes"][0] == "MPOL_DEFAULT" and "iversion" in features["mountOptions"]
    assert "SCMP_ACT_NOTIFY" in features["linux"]["seccomp"]["actions"]
    assert set(features["hooks"]) == {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
    assert {"mount", "pid", "time", "user"} <= set(features["linux"]["namespaces"])
    assert "CAP_SYS_ADMIN" in features["linux"]["capabilities"] and "rro" in features["mountOptions"]
    assert features["annotations"]["io.github.seccomp.libseccomp.version"].startswith("2.")


def test_version_and_help_and_no_words(bundle: Bundle) -> None:
    assert bundle.ok("--version").startswith("nacre-runc version ") and "spec: 1." in bundle.ok("-v")
    assert "commands: " in bundle.ok("--help")
    assert "no such command" in bundle.fails("frobnicate")
    assert "there is no option --frob" in bundle.fails("create", "--frob", "x")
    assert "needs a value" in bundle.fails("create", "--bundle")


def test_every_command_tells_its_options(bundle: Bundle) -> None:
    for command in options.COMMANDS:
        assert bundle.ok(command, "--help").startswith(f"usage: nacre-runc {command} ")
    assert "[--no-pivot]" in bundle.ok("run", "-h") and "[--pid-file VALUE]" in bundle.ok("exec", "--help")


def test_a_log_that_cannot_be_kept_is_refused_before_anything_is_done(bundle: Bundle, tmp_path: Path) -> None:
    bundle.write()
    assert "neither text nor json" in bundle.fails("--log-format", "xml", "create", "-b", str(bundle.path), bundle.name)
    assert "/nowhere/log" in bundle.fails("--log", "/nowhere/log", "create", "-b", str(bundle.path), bundle.name)
    assert leftovers(bundle) == []


def test_a_failure_goes_to_the_log_as_json_and_as_text(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    bundle.call("--log", str(log), "--log-format", "json", "state", "nobody")
    entry = json.loads(log.read_text())
    assert entry["level"] == "error" and "find container nobody" in entry["msg"] and entry["time"].endswith("Z")
    log.unlink()
    bundle.call("--log", str(log), "state", "nobody")
    assert log.read_text().startswith('time="') and 'level=error msg="' in log.read_text()


def test_a_pid_file_that_cannot_be_written_undoes_the_container(bundle: Bundle) -> None:
    bundle.write()
    assert "No such file" in bundle.fails("create", "-b", str(bundle.path), "--pid-file", "/nowhere/pid", bundle.name)
    assert leftovers(bundle) == []


def test_exec_runs_beside_the_containers_process(bundle: Bundle) -> None:
    bundle.up()
    done = bundle.exec(bundle.name, "sh", "-c", "echo out; echo err >&2; cat; exit 9", input="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (9, "out\nin\n", "err\n")
    assert bundle.inside("hostname; cat /proc/1/comm") == "nacre\nsleep\n"
    kinds = "pid net ipc uts mnt cgroup"
    ours, inits = (bundle.inside(f"for n in {kinds}; do readlink /proc/{who}/ns/$n; done") for who in ("self", 1))
    assert ours == inits and len(ours.split()) == 6
    assert bundle.exec(bundle.name, "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_exec_takes_the_process_from_options(bundle: Bundle) -> None:
    bundle.process["env"] = ["PATH=/bin", "BASE=1"]
    bundle.up()
    options = ["--cwd", "/tmp", "--user", "1000:1001", "--env", "MORE=2", "-e", "AND=3", "--additional-gids", "7", "-g", "8"]
    told = bundle.inside(
        "pwd; id -u; id -g; id -G; echo $BASE$MORE$AND $HOME; grep NoNewPrivs /proc/self/status", *options, "--no-new-privs"
    )
    assert told.splitlines() == ["/tmp", "1000", "1001", "1001 7 8", "123 /home/web", "NoNewPrivs:\t1"]
    caps = bundle.inside("grep CapEff /proc/self/status", "--cap", "CAP_NET_ADMIN")
    assert int(caps.split()[1], 16) >> 12 & 1
    assert not int(bundle.inside("grep CapEff /proc/self/status").split()[1], 16) >> 12 & 1


def test_exec_takes_the_process_from_a_file(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    (tmp_path / "process.json").write_text(json.dumps({"cwd": "/bin", "args": ["pwd"], "user": {"uid": 5, "gid": 5}}))
    assert bundle.ok("exec", "--process", str(tmp_path / "process.json"), bundle.name) == "/bin\n"
    (tmp_path / "bad.json").write_text('{"cwd": "/", "args": 3}')
    assert "process.args" in bundle.fails("exec", "-p", str(tmp_path / "bad.json"), bundle.name, code=255)


def test_exec_detached_writes_its_pid(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    bundle.quietly("exec", "-d", "--pid-file", str(tmp_path / "pid"), bundle.name, "sleep", "50")
    pid = int((tmp_path / "pid").read_text())
    assert pid in json.loads(bundle.ok("ps", "-f", "json", bundle.name))


def test_exec_before_start_and_after_the_end(bundle: Bundle) -> None:
    bundle.script("sleep 100").create()
    assert bundle.inside("echo early") == "early\n"
    bundle.ok("kill", bundle.name, "KILL")
    await_status(bundle, "stopped")
    assert "it is stopped" in bundle.fails("exec", bundle.name, "true", code=255)


def test_exec_of_a_missing_command_says_so_with_255(bundle: Bundle) -> None:
    bundle.up()
    assert 'exec: "nope": executable file not found in $PATH' in bundle.fails("exec", bundle.name, "nope", code=255)
    assert "no command after the id" in bundle.fails("exec", bundle.name, code=255)


def test_exec_goes_into_a_group_below_the_containers_when_asked(bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "cgroup"]
    bundle.up()
    inner = cgroups.Cgroup(cgroups.discover(), f"{bundle.cgroup}/inner")
    told = bundle.fails("exec", "--cgroup", "inner", bundle.name, "true", code=255)
    assert f"there is no {inner.directories()[0][1]}" in told and not inner.exists()
    inner.create(limits=False)
    groups = bundle.inside("cat /proc/self/cgroup", "--cgroup", "inner")
    assert f"{bundle.cgroup}/inner" in groups
    assert "it leads out of it" in bundle.fails("exec", "--cgroup", "inner/../../outside", bundle.name, "true", code=255)


def test_of_variables_given_twice_the_last_one_counts(bundle: Bundle) -> None:
    bundle.config["process"]["env"] += ["TWICE=first", "TWICE=second"]
    bundle.up()
    told = bundle.inside("env; tr '\\0' '\\n' </proc/1/environ", "--env", "PATH=/bin:/added", "-e", "TWICE=third").splitlines()
    assert [line for line in told if "TWICE" in line] == ["TWICE=third", "TWICE=second"]
    assert told.count("PATH=/bin:/added") == 1


def test_exec_goes_into_groups_by_controller_and_not_out_of_the_containers(bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "cgroup"]
    bundle.up()
    hierarchy = cgroups.discover().need("pids", "test")
    Path(f"{hierarchy.mount}{bundle.cgroup}/inner").mkdir()
    groups = bundle.inside("cat /proc/self/cgroup", "--cgroup", "pids:inner").splitlines()
    assert any("pids" in line or line.startswith("0::") for line in groups if line.endswith(f"{bundle.cgroup}/inner")), groups
    assert hierarchy.version == 2 or any(line.endswith(bundle.cgroup) for line in groups)
    for wrong in ("..", "a/../..", "pids:..", ":inner"):
        assert "below the container's" in bundle.fails("exec", "--cgroup", wrong, bundle.name, "true", code=255)
    assert "nonsense" in bundle.fails("exec", "--cgroup", "nonsense:/", bundle.name, "true", code=255)


@pytest.mark.parametrize("command", ["create", "run", "exec"])
def test_a_descriptor_of_the_process_goes_to_who_listens(bundle: Bundle, command: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "pidfd"))
        listener.listen(1)
        option = ("--pidfd-socket", str(tmp_path / "pidfd"))
        if command == "exec":
            bundle.up()
            bundle.quietly("exec", "-d", *option, "--pid-file", str(tmp_path / "pid"), bundle.name, "sleep", "100")
        else:
            bundle.script("sleep 100").write()
            detach = ["-d"] if command == "run" else []
            bundle.quietly(command, *detach, *option, "--pid-file", str(tmp_path / "pid"), "-b", str(bundle.path), bundle.name)
        with listener.accept()[0] as connection:
            word, descriptors, _, _ = socket.recv_fds(connection, 100, 1)
    assert word == (b"setns" if command == "exec" else b"standard")
    with owned(descriptors[0]):
        found = Path(f"/proc/self/fdinfo/{descriptors[0]}").read_text()
    assert f"Pid:\t{(tmp_path / 'pid').read_text()}\n" in found


def test_a_warning_without_a_log_is_told_on_stderr(bundle: Bundle) -> None:
    bundle.process["capabilities"]["bounding"] = ["CAP_TO_COME"]
    done = bundle.run("true")
    assert done.returncode == 0 and "nacre-runc: warning: " in done.stderr and "CAP_TO_COME" in done.stderr


def test_debug_tells_what_is_asked_and_which_process_it_became(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    done = bundle.call("--debug", "exec", bundle.name, "true")
    assert (
        f"debug: nacre-runc {__version__} is asked to exec {bundle.name} true\n" in done.stderr and " is set up\n" in done.stderr
    )
    bundle.ok("--debug", "--log", str(tmp_path / "log"), "--log-format", "json", "state", bundle.name)
    assert {json.loads(line)["level"] for line in (tmp_path / "log").read_text().splitlines()} == {"debug"}


def test_exec_makes_an_added_capability_ambient_where_some_are_inheritable(bundle: Bundle) -> None:
    bundle.process["capabilities"] |= {"inheritable": ["CAP_SYSLOG"], "bounding": ["CAP_SYSLOG"]}
    bundle.up()
    assert bundle.inside("grep CapAmb /proc/self/status", "--cap", "CAP_SYSLOG").split()[1] == f"{1 << 34:016x}"


def with_descriptor_three(bundle: Bundle, *words: str, **more: str) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """The call with a pipe as descriptor 3, and what came through it."""
    read, write = os.pipe()
    caller = Bundle(**{**vars(bundle), "runtime": ("bash", "-c", f'exec "$@" 3>&{write}', "bash", *bundle.runtime)})
    done = caller.call(*words, pass_fds=(write,), env=environment(**more))
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return done, pipe.read()


def test_descriptors_are_passed_on_by_number_and_no_others(bundle: Bundle) -> None:
    bundle.script("echo through >&3; ls /proc/self/fd | sort | tr '\\n' ' '").write()
    done, told = with_descriptor_three(bundle, "run", "--preserve-fds", "1", "-b", str(bundle.path), bundle.name)
    assert told == b"through\n" and done.stdout.split() == ["0", "1", "2", "3", "4"], "4 is ls's own"
    done, told = with_descriptor_three(bundle, "run", "-b", str(bundle.path), bundle.name)
    assert told == b"" and done.stdout.split() == ["0", "1", "2", "3"], "nothing is passed unasked; 3 is ls's own"


def test_a_descriptor_to_pass_on_that_is_not_open_is_named_and_none_of_ours_takes_its_place(bundle: Bundle) -> None:
    bundle.script("echo $LISTEN_FDS; ls /proc/self/fd | tr '\\n' ' '").write()
    done, _ = with_descriptor_three(bundle, "run", "--preserve-fds", "40", "-b", str(bundle.path), bundle.name)
    assert done.returncode == 1 and "descriptor 4 is not open" in done.stderr
    assert leftovers(bundle) == []
    done, _ = with_descriptor_three(bundle, "run", "-b", str(bundle.path), bundle.name, LISTEN_FDS="40")
    assert done.stdout == "40\n0 1 2 3 4 ", "a starter that announces too many is not ours to judge; 4 is ls's own"


def test_sockets_of_an_activating_starter_are_passed_on(bundle: Bundle) -> None:
    bundle.script("echo $LISTEN_FDS $LISTEN_PID; echo x >&3").write()
    done, told = with_descriptor_three(bundle, "run", "-b", str(bundle.path), bundle.name, LISTEN_FDS="1")
    assert done.stdout == "1 1\n" and told == b"x\n", done.stderr


def test_without_pivot_the_hosts_root_is_out_of_reach_too(bundle: Bundle) -> None:
    bundle.script("ls / | tr '\\n' ' '; cd /..; ls | wc -l; cat /proc/1/root/etc/passwd | head -n 1").write()
    done = bundle.call("run", "--no-pivot", "-b", str(bundle.path), bundle.name)
    assert done.stdout == "bin dev etc mnt proc root sys tmp 8\nroot:x:0:0::/root:/bin/sh\n", done.stderr


def test_the_options_of_crun_are_understood(bundle: Bundle, tmp_path: Path) -> None:
    bundle.script("cat /proc/self/cgroup").write()
    other = tmp_path / "other.json"
    (bundle.path / "config.json").rename(other)
    done = bundle.call("--cgroup-manager", "cgroupfs", "run", "--config", str(other), "--bundle", str(bundle.path), bundle.name)
    assert done.returncode == 0, done.stderr
    bundle.linux["resources"] = {}
    other.write_text(json.dumps(bundle.config))
    before = Path("/proc/self/cgroup").read_text()
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "cgroup"]
    other.write_text(json.dumps(bundle.config))
    done = bundle.call("--cgroup-manager", "disabled", "run", "-f", str(other), "-b", str(bundle.path), bundle.name)
    assert done.stdout == before, done.stderr


def test_create_returns_while_init_holds_a_pipe(bundle: Bundle) -> None:
    """conmon reads the runtime's end of life, not its pipes' end."""
    bundle.script("echo from inside").write()
    read, write = os.pipe()
    bundle.ok("create", "-b", str(bundle.path), bundle.name, stdout=write, stderr=write, capture_output=False)
    os.close(write)
    bundle.ok("start", bundle.name)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "from inside\n"
