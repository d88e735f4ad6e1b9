"""seccomp filters from an OCI profile to what a program meets (config-linux.md "Seccomp")."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runc_support import Bundle, made

from nacre.linux import process, seccomp, seccomp_compiler


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
    return {"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": list(rules)} | more


def rule(action: str, *names: str, **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action} | more


def test_a_call_is_refused_with_the_errno_that_is_asked(bundle: Bundle) -> None:
    for number, words in (
        (None, "Operation not permitted"),
        (errno.ENOSYS, "Function not implemented"),
        (errno.EBUSY, "resource busy"),
    ):
        more = {} if number is None else {"errnoRet": number}
        bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat", **more))
        done = bundle.run("mkdir /tmp/x; echo on")
        assert words in done.stderr and done.stdout == "on\n"


@pytest.mark.parametrize(
    ("action", "number"),
    [("SCMP_ACT_KILL_PROCESS", signal.SIGSYS), ("SCMP_ACT_KILL", signal.SIGSYS), ("SCMP_ACT_TRAP", signal.SIGSYS)],
)
def test_a_call_ends_the_program(bundle: Bundle, action: str, number: signal.Signals) -> None:
    bundle.linux["seccomp"] = profile(rule(action, "mkdir", "mkdirat"))
    assert bundle.run("mkdir /tmp/x; exit $?").returncode == 128 + number


def test_a_logged_call_is_allowed(bundle: Bundle) -> None:
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_LOG", "mkdir", "mkdirat"), flags=["SECCOMP_FILTER_FLAG_LOG"])
    assert bundle.says("mkdir /tmp/x && echo made") == "made\n"


def test_arguments_decide(bundle: Bundle) -> None:
    argument = {"index": 0, "value": 1000, "op": "SCMP_CMP_EQ"}
    bundle.linux["seccomp"] = profile(
        rule("SCMP_ACT_ERRNO", "kill", errnoRet=errno.EPIPE, args=[{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}])
    )
    done = bundle.run("sleep 100 & kill -10 $!; echo a$?; kill -12 $!; echo b$?")
    assert done.stdout == "a1\nb0\n" and "Broken pipe" in done.stderr
    argument["op"] = "SCMP_CMP_SIDEWAYS"
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "kill", args=[argument]))
    assert "SCMP_CMP_SIDEWAYS" in bundle.refuses("true")


def test_calls_that_nobody_knows_are_left_out(bundle: Bundle) -> None:
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "no_such_call", "mkdir", "mkdirat"))
    assert bundle.run("mkdir /tmp/x").returncode == 1


def answered(filter_: dict[str, Any], call: int) -> int:
    """The errno of a system call under the profile's filter, in a process of its own."""
    load = seccomp.loader(seccomp_compiler.compile_profile(filter_), 0)
    raw = ctypes.CDLL(None, use_errno=True)["syscall"]
    pid = os.fork()
    if pid == 0:
        process.set_no_new_privileges()
        ctypes.set_errno(0)
        load()
        raw(ctypes.c_long(call), ctypes.c_long(-1))
        os._exit(ctypes.get_errno())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")
@pytest.mark.parametrize("architectures", [["SCMP_ARCH_X86_64"], ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32"], []])
def test_a_call_newer_than_all_of_an_allow_list_is_one_that_the_kernel_lacks(architectures: list[str]) -> None:
    allow = profile(rule("SCMP_ACT_ALLOW", "close", "exit_group"), default="SCMP_ACT_ERRNO", architectures=architectures)
    close, getppid, exit_group, x32 = 3, 110, 231, 1 << 30
    assert [answered(allow, call) for call in (close, getppid, exit_group + 1)] == [errno.EBADF, errno.EPERM, errno.ENOSYS]
    if "SCMP_ARCH_X32" in architectures:
        assert [answered(allow, x32 + call) for call in (getppid, 600)] == [errno.EPERM, errno.ENOSYS]
    deny = profile(rule("SCMP_ACT_ERRNO", "close", errnoRet=errno.EXDEV), architectures=architectures)
    assert [answered(deny, call) for call in (close, 110)] == [errno.EXDEV, 0]


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_is_loaded_for_any_user_with_and_without_new_privileges(
    bundle: Bundle, uid: int, no_new_privileges: bool
) -> None:
    bundle.process |= {"user": {"uid": uid, "gid": uid}, "noNewPrivileges": no_new_privileges}
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat"))
    told = bundle.says("grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status")
    found = dict(line.split() for line in told.splitlines())
    assert found["Seccomp:"] == "2" and found["NoNewPrivs:"] == str(int(no_new_privileges))
    assert uid == 0 or int(found["CapEff:"], 16) == 0, "nothing that loading it needs is left"


def test_only_what_execve_needs_is_called_after_the_filter_is_loaded(bundle: Bundle) -> None:
    """A profile that allows nothing but what a static program itself calls."""
    calls = "execve brk arch_prctl set_tid_address set_robust_list rseq prlimit64 readlink readlinkat getrandom mprotect write exit_group"
    calls += " getuid prctl mmap munmap uname"
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ALLOW", *calls.split()), default="SCMP_ACT_KILL_PROCESS")
    assert bundle.args("echo", "alive").run().stdout == "alive\n"


def test_exec_meets_the_containers_filter(bundle: Bundle) -> None:
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir", "mkdirat"))
    bundle.up()
    assert bundle.exec(bundle.name, "mkdir", "/tmp/x").returncode == 1


def test_a_filter_that_forbids_execve_is_told(bundle: Bundle) -> None:
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "execve"))
    assert "operation not permitted" in bundle.refuses("true")
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_KILL_PROCESS", "execve"))
    assert "seccomp profile may forbid execve" in bundle.refuses("true")


def test_a_death_by_the_filter_is_not_put_down_to_memory_that_ran_out_beside_it(bundle: Bundle) -> None:
    """systemd takes a scope away with its last process, and the slice that is left has counted for all in it."""
    bundle.linux["resources"]["memory"] = {"limit": 32 << 20, "swap": 32 << 20}
    assert bundle.run("tail /dev/zero").returncode == 128 + signal.SIGKILL
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_KILL_PROCESS", "execve"))
    assert "seccomp profile may forbid execve" in bundle.refuses("true")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"defaultAction": "SCMP_ACT_SING"}, "SCMP_ACT_SING"),
        ({"flags": ["SECCOMP_FILTER_FLAG_FLY"]}, "SECCOMP_FILTER_FLAG_FLY"),
        ({"listenerMetadata": "x"}, "listenerMetadata is set without listenerPath"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "listenerPath is not set"),
        ({"syscalls": [rule("SCMP_ACT_NOTIFY", "mkdir")]}, "listenerPath is not set"),
        ({"defaultErrnoRet": 1}, "SCMP_ACT_ALLOW has errnoRet 1"),
        ({"syscalls": [rule("SCMP_ACT_KILL", "mkdir", errnoRet=5)]}, "SCMP_ACT_KILL has errnoRet 5"),
        ({"architectures": ["SCMP_ARCH_ABACUS"]}, "SCMP_ARCH_ABACUS"),
    ],
)
def test_a_profile_that_cannot_be_honoured_is_refused_by_name(bundle: Bundle, change: dict[str, Any], named: str) -> None:
    bundle.linux["seccomp"] = profile() | change
    assert named in bundle.refuses("true")


def test_the_compiled_filter_is_kept_by_the_profiles_content(bundle: Bundle) -> None:
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir"))
    bundle.says("true")
    (kept,) = (bundle.root / ".seccomp").iterdir()
    before = kept.stat()
    bundle.says("true")
    assert kept.stat().st_mtime_ns == before.st_mtime_ns and kept.stat().st_mode & 0o777 == 0o600
