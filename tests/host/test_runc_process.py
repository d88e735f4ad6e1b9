"""The container's process: user, groups, capabilities, limits, environment, directory, priorities, terminal (config.md "Process")."""

from __future__ import annotations

import array
import fcntl
import json
import os
import pty
import resource
import select
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runc_support import CALL_S, Bundle, environment, made

from nacre.linux import capabilities


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def status_fields(text: str) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def test_user_groups_umask_and_home(bundle: Bundle) -> None:
    bundle.process["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o077}
    told = bundle.says("id -u; id -g; id -G; umask; echo $HOME; touch /tmp/x 2>/dev/null; stat -c %a /dev/null")
    assert told.splitlines() == ["1000", "1001", "1001 5 6", "0077", "/home/web", "666"]


def test_the_host_groups_of_the_starter_are_not_kept(bundle: Bundle) -> None:
    assert bundle.says("id -G") == "0\n"


def test_environment_is_exactly_what_is_asked_and_home(bundle: Bundle) -> None:
    bundle.process["env"] = ["PATH=/bin", "A=b=c", "EMPTY=", "HOME=/somewhere"]
    assert sorted(bundle.args("env").run().stdout.splitlines()) == ["A=b=c", "EMPTY=", "HOME=/somewhere", "PATH=/bin"]
    bundle.process["env"][-1] = "HOME="
    assert "HOME=/root" in bundle.args("env").run().stdout.splitlines()


def test_a_missing_working_directory_is_made(bundle: Bundle) -> None:
    bundle.process["cwd"] = "/not/there/yet"
    assert bundle.says("pwd") == "/not/there/yet\n"


def test_a_working_directory_that_only_the_user_or_only_root_may_enter(bundle: Bundle) -> None:
    private = bundle.rootfs / "private"
    private.mkdir(mode=0o700)
    bundle.process |= {"user": {"uid": 1000, "gid": 1000}, "cwd": "/private"}
    assert bundle.says("pwd") == "/private\n"
    os.chown(private, 1000, 1000)
    assert bundle.says("pwd") == "/private\n"


def test_capabilities_are_exactly_the_five_sets(bundle: Bundle) -> None:
    kept = ["CAP_KILL", "CAP_CHOWN", "CAP_NET_ADMIN"]
    bundle.process["capabilities"] = {
        "bounding": kept,
        "permitted": kept,
        "effective": kept,
        "inheritable": kept[:2],
        "ambient": kept[:1],
    }
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    fields = status_fields(bundle.says("cat /proc/self/status"))
    assert int(fields["CapBnd"], 16) == capabilities.mask(kept)
    assert int(fields["CapInh"], 16) == capabilities.mask(kept[:2])
    assert int(fields["CapPrm"], 16) == int(fields["CapEff"], 16) == int(fields["CapAmb"], 16) == capabilities.mask(kept[:1])


def test_without_capabilities_root_has_none(bundle: Bundle) -> None:
    del bundle.process["capabilities"]
    fields = status_fields(bundle.says("cat /proc/self/status"))
    assert {fields[name] for name in ("CapBnd", "CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}


def test_an_unknown_capability_is_left_out_with_a_warning(bundle: Bundle, tmp_path: Path) -> None:
    bundle.process["capabilities"] = {"bounding": ["CAP_KILL", "CAP_FLY"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]}
    bundle.write()
    bundle.ok("--log", str(tmp_path / "log"), "run", "-b", str(bundle.path), bundle.name)
    assert "CAP_FLY" in (tmp_path / "log").read_text()


def test_no_new_privileges_is_as_asked(bundle: Bundle) -> None:
    for wanted in (False, True):
        bundle.process["noNewPrivileges"] = wanted
        assert status_fields(bundle.says("cat /proc/self/status"))["NoNewPrivs"] == str(int(wanted))


def test_resource_limits_are_set(bundle: Bundle) -> None:
    bundle.process["rlimits"] = [
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": (1 << 64) - 1},
    ]
    lines = bundle.says("cat /proc/self/limits").splitlines()
    found = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert found["Max open files"] == ["100", "200"] and found["Max core file size"] == ["0", "0"]
    assert found["Max stack size"][0] == str(1 << 20)


def test_a_limit_above_the_hosts_is_lowered_and_told_where_it_cannot_be_raised(bundle: Bundle, tmp_path: Path) -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if capabilities.capget()[0] & capabilities.SYS_RESOURCE or hard == resource.RLIM_INFINITY:
        pytest.skip("setrlimit(2) may raise hard limits here")
    bundle.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": hard + 1, "hard": hard + 1}]
    bundle.script("ulimit -n").write()
    assert bundle.ok("--log", str(tmp_path / "log"), "run", "-b", str(bundle.path), bundle.name) == f"{hard}\n"
    assert "above the host's hard limit" in (tmp_path / "log").read_text()


def test_an_oom_score_that_cannot_be_lowered_is_told_and_not_fatal(bundle: Bundle, tmp_path: Path) -> None:
    bundle.process["oomScoreAdj"] = 321
    assert bundle.says("cat /proc/self/oom_score_adj") == "321\n"
    bundle.process["oomScoreAdj"] = -999
    bundle.write()
    log = tmp_path / "log"
    told = bundle.ok("--log", str(log), "run", "-b", str(bundle.path), bundle.name)
    lowered = capabilities.capget()[0] & capabilities.SYS_RESOURCE
    assert told == ("-999\n" if lowered else Path("/proc/self/oom_score_adj").read_text())
    assert lowered or "CAP_SYS_RESOURCE" in log.read_text()


def test_scheduler_nice_and_io_priority_are_set(bundle: Bundle) -> None:
    bundle.process |= {
        "scheduler": {"policy": "SCHED_BATCH", "nice": 7},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
    }
    pid = bundle.up()
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH and os.getpriority(os.PRIO_PROCESS, pid) == 7
    done = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True, check=True)
    assert done.stdout == "best-effort: prio 6\n"


def test_a_realtime_scheduler_takes_its_priority(bundle: Bundle) -> None:
    if Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists():  # then a new group has no realtime of its own
        bundle.linux["resources"]["cpu"] = {"realtimePeriod": 1000000, "realtimeRuntime": 1000}
    bundle.process["scheduler"] = {"policy": "SCHED_FIFO", "priority": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}
    pid = bundle.up("exec sleep 100")
    assert os.sched_getscheduler(pid) == os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    assert os.sched_getparam(pid).sched_priority == 5


needs_two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine has one CPU")


@needs_two_cpus
def test_exec_runs_on_the_cpus_it_is_given(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    process = {"cwd": "/", "args": ["grep", "Cpus_allowed_list", "/proc/self/status"], "env": ["PATH=/bin"]}
    process["execCPUAffinity"] = {"initial": "0", "final": "1"}
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert bundle.ok("exec", "--process", str(tmp_path / "process.json"), bundle.name).split() == ["Cpus_allowed_list:", "1"]


@needs_two_cpus
@pytest.mark.parametrize("command", ["run", "exec"])
def test_the_starters_cpus_are_not_the_containers(bundle: Bundle, command: str) -> None:
    bound = Bundle(**{**vars(bundle), "runtime": ("taskset", "-c", "0", *bundle.runtime)})
    if command == "exec":
        bundle.up()
        found = bound.inside("nproc")
    else:
        found = bound.says("nproc")
    assert int(found) == len(os.sched_getaffinity(0)) > 1


def test_personality_makes_a_32_bit_world(bundle: Bundle) -> None:
    bundle.linux["personality"] = {"domain": "LINUX32"}
    assert bundle.says("cat /proc/self/personality").strip() == "00000008"


def test_stdio_that_is_a_pipe_belongs_to_the_containers_user(bundle: Bundle) -> None:
    bundle.process["user"] = {"uid": 1000, "gid": 1000}
    assert bundle.says("echo again > /dev/stdout") == "again\n"


def test_signals_ignored_or_blocked_by_the_starter_are_the_programs_again(bundle: Bundle) -> None:
    bundle.args("grep", "-E", "SigBlk|SigIgn", "/proc/self/status").write()
    caller = Bundle(**{**vars(bundle), "runtime": ("bash", "-c", 'trap "" HUP USR1; exec "$@"', "bash", *bundle.runtime)})
    told = caller.ok("run", "-b", str(bundle.path), bundle.name)
    assert {line.split()[1] for line in told.splitlines()} == {"0" * 16}


# -- terminals


def receive_console(listener: socket.socket) -> tuple[bytes, int]:
    listener.settimeout(CALL_S)
    connection, _ = listener.accept()
    with connection:
        data, ancillary, _, _ = connection.recvmsg(100, 100)
    return data, array.array("i", ancillary[0][2])[0]


def read_all(master: int) -> bytes:
    """Up to the end of the terminal's last holder."""
    found = b""
    while select.select([master], [], [], 20)[0]:
        try:
            data = os.read(master, 4096)
        except OSError:
            return found
        if not data:
            return found
        found += data
    raise AssertionError(f"the terminal stays open after {found!r}")


def test_a_terminal_is_handed_over_by_socket_in_its_size_and_for_its_user(bundle: Bundle, tmp_path: Path) -> None:
    bundle.process |= {"terminal": True, "consoleSize": {"height": 33, "width": 77}, "user": {"uid": 1000, "gid": 5}}
    bundle.script(
        "tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo all; stat -c %u /dev/pts/0; ls -l /dev/console | wc -l"
    ).write()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.sock"))
        listener.listen(1)
        bundle.quietly(*("create", "-b", str(bundle.path), "--console-socket", str(tmp_path / "c.sock"), bundle.name))
        data, master = receive_console(listener)
    bundle.ok("start", bundle.name)
    assert data == b"/dev/ptmx"
    assert read_all(master).decode().split("\r\n") == ["/dev/pts/0", "33 77", "all", "1000", "1", ""]
    os.close(master)


def test_exec_takes_a_terminal_by_socket(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.sock"))
        listener.listen(1)
        words = ("exec", "-d", "-t", "--console-socket", str(tmp_path / "c.sock"), bundle.name, "sh", "-c", "tty; echo end")
        bundle.quietly(*words)
        _, master = receive_console(listener)
    assert read_all(master) == b"/dev/pts/0\r\nend\r\n"
    os.close(master)


def test_run_on_a_terminal_joins_ours_to_the_containers(bundle: Bundle) -> None:
    bundle.process["terminal"] = True
    bundle.script("stty size; read line; echo got $line; exit 4").write()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 40, 0, 0))
    words = [*bundle.runtime, "--root", str(bundle.root), "run", "-b", str(bundle.path), bundle.name]
    running = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True)
    os.close(slave)
    os.write(master, b"hello\n")
    found = read_all(master)
    assert running.wait() == 4
    os.close(master)
    assert b"20 40" in found and b"got hello" in found


@pytest.mark.parametrize("command", ["run", "exec"])
def test_a_terminal_that_ends_on_a_pipe_has_plain_lines(bundle: Bundle, command: str) -> None:
    if command == "exec":
        bundle.up()
        assert bundle.ok("exec", "-t", bundle.name, "echo", "line") == "line\n"
        return
    bundle.process["terminal"] = True
    assert bundle.says("echo line") == "line\n"


def test_a_terminal_without_a_socket_is_refused_and_nothing_left(bundle: Bundle) -> None:
    bundle.process["terminal"] = True
    bundle.write()
    assert "--console-socket" in bundle.fails("create", "-b", str(bundle.path), bundle.name)
    assert bundle.ok("list", "-q") == ""
    words = ("create", "-b", str(bundle.path), "--console-socket", "/nowhere/sock", bundle.name)
    assert "hand the terminal to /nowhere/sock" in bundle.fails(*words)
    assert bundle.ok("list", "-q") == ""


def test_memory_comes_from_the_nodes_of_the_policy_in_exec_too(bundle: Bundle) -> None:
    bundle.linux["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
    bundle.up("grep -o -m1 'bind=static:0' /proc/self/numa_maps >/policy; sleep 100")
    assert bundle.inside("grep -o -m1 'bind=static:0' /proc/self/numa_maps; cat /policy") == "bind=static:0\n" * 2


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"mode": "MPOL_SOMEHOW"}, "mode is 'MPOL_SOMEHOW'"),
        ({"mode": "MPOL_BIND", "nodes": "x"}, "'x' is no list of memory nodes"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_FAST"]}, "flags has 'MPOL_F_FAST'"),
        ({"mode": "MPOL_BIND", "nodes": "1023"}, "set the memory policy MPOL_BIND 1023"),
        ({"mode": "MPOL_DEFAULT", "nodes": "0"}, "set the memory policy MPOL_DEFAULT 0"),
        ({"nodes": "0"}, "linux.memoryPolicy.mode is missing"),
    ],
)
def test_a_memory_policy_that_cannot_be_is_told(bundle: Bundle, policy: dict[str, Any], told: str) -> None:
    bundle.linux["memoryPolicy"] = policy
    if told.startswith("set the"):
        bundle.args("true").create()
        assert told in bundle.fails("start", bundle.name)
    else:
        assert told in bundle.refuses("true")


def test_an_io_priority_outside_its_class_is_refused(bundle: Bundle) -> None:
    bundle.process["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 9}
    assert "priority is 9, outside 0…7" in bundle.refuses("true")


@pytest.mark.skipif(os.path.exists("/sys/fs/selinux/enforce"), reason="SELinux is on here")
def test_a_label_that_this_host_cannot_give_is_refused(bundle: Bundle) -> None:
    bundle.process["selinuxLabel"] = "system_u:system_r:container_t:s0"
    assert "SELinux is off on this host" in bundle.refuses("true")
