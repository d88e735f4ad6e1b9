"""System calls that somebody else answers: SCMP_ACT_NOTIFY and its listener (config-linux.md "Seccomp")."""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import test_runc_namespaces
from runc_support import CALL_S, Bundle, made, with_user_namespace
from test_runc_namespaces import Ordinary
from test_runc_seccomp import profile, rule

from nacre.linux import seccomp
from nacre.runc import listener

_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_EXECVE = 59


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


ordinary = test_runc_namespaces.ordinary


class Agent:
    """Takes listeners at a socket; answers each call with an errno, or with "go on" where it is None."""

    def __init__(self, path: Path, *, error: int | None, answers: bool = True) -> None:
        self.states: list[dict[str, Any]] = []
        self.calls: list[int] = []
        self._error, self._answers = error, answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Agent:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(CALL_S)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # shut down
            with connection:
                data, rights, _, _ = connection.recvmsg(65536, 1024)
                while more := connection.recv(65536):
                    data += more
            if not rights:
                continue
            self.states.append(json.loads(data))
            ((_, _, content),) = rights
            (listener,) = array.array("i", content)
            if not self._answers:
                os.close(listener)
                continue
            self._threads.append(threading.Thread(target=self._answer, args=(listener,), daemon=True))
            self._threads[-1].start()

    def _answer(self, listener: int) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while True:
            ((_, event),) = poll.poll(CALL_S * 1000)
            if not event & select.POLLIN:  # hung up: nobody is left under the filter
                os.close(listener)
                return
            call = bytearray(80)
            ioctl(listener, _RECEIVE, call)
            (identity,) = struct.unpack_from("Q", call)
            self.calls.append(struct.unpack_from("i", call, 16)[0])
            ioctl(listener, _ANSWER, struct.pack("QqiI", identity, 0, -(self._error or 0), 0 if self._error else 1))


def asking(path: Path, *calls: str, **more: Any) -> dict[str, Any]:
    return profile(rule("SCMP_ACT_NOTIFY", *calls), listenerPath=str(path), **more)


def test_an_agent_answers_the_containers_calls(bundle: Bundle, tmp_path: Path) -> None:
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir", "mkdirat", listenerMetadata="a\nb")
    with Agent(tmp_path / "agent", error=errno.EMLINK) as agent:
        done = bundle.run("mkdir /tmp/x; echo on")
    assert "Too many links" in done.stderr and done.stdout == "on\n"
    (told,) = agent.states
    assert told["fds"] == ["seccompFd"] and told["metadata"] == "a\nb" and told["pid"] == told["state"]["pid"] > 1
    assert told["state"]["id"] == bundle.name and told["state"]["status"] == "created" and agent.calls


def test_each_exec_has_a_listener_of_its_own_and_the_calls_may_go_on(bundle: Bundle, tmp_path: Path) -> None:
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir", "mkdirat")
    with Agent(tmp_path / "agent", error=None) as agent:
        bundle.up()
        assert bundle.inside("mkdir /tmp/x && echo made") == "made\n"
        bundle.ok("delete", "--force", bundle.name)
    first, second = agent.states
    assert second["pid"] != first["pid"] == second["state"]["pid"] and second["state"]["status"] == "running"


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_start_container_hook_is_answered_by_the_programs_agent(bundle: Bundle, tmp_path: Path, uid: int) -> None:
    with_user_namespace(bundle)
    bundle.process["user"] = {"uid": uid, "gid": uid}
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir", "mkdirat")
    told = "mkdir /tmp/x 2>&1 | grep 'Too many links'"
    bundle.config["hooks"] = {"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", told]}]}
    with Agent(tmp_path / "agent", error=errno.EMLINK) as agent:
        assert "Too many links" in bundle.says(told)
    assert len(agent.states) == 1


def test_every_call_may_be_asked_about_even_the_runtimes_own(bundle: Bundle, tmp_path: Path) -> None:
    """What hands the listener over makes no system call under the filter: it would wait for an answer for ever."""
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir") | {"defaultAction": "SCMP_ACT_NOTIFY"}
    with Agent(tmp_path / "agent", error=None) as agent:
        done = bundle.args("echo", "alive").run()
    assert done.stdout == "alive\n", done.stderr
    assert agent.calls[0] == _EXECVE


@pytest.mark.parametrize("flags", [["SECCOMP_FILTER_FLAG_TSYNC"], ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]])
@pytest.mark.parametrize("uid", [0, 1000])
def test_an_agent_is_asked_by_any_user_and_with_any_flag(bundle: Bundle, tmp_path: Path, uid: int, flags: list[str]) -> None:
    with_user_namespace(bundle)
    bundle.process["user"] = {"uid": uid, "gid": uid}
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir", "mkdirat", flags=flags)
    with Agent(tmp_path / "agent", error=errno.EMLINK):
        assert "Too many links" in bundle.run("mkdir /tmp/x").stderr


def test_without_root_the_agent_of_a_user_answers_for_his_containers(ordinary: Ordinary) -> None:
    ordinary.config["linux"]["seccomp"] = asking(ordinary.place / "agent", "mkdir", "mkdirat")
    with Agent(ordinary.place / "agent", error=errno.EMLINK):
        (ordinary.place / "agent").chmod(0o777)
        told = ordinary.run("mkdir /tmp/x; echo on")
    assert "Too many links" in told.stderr and told.stdout == "on\n"


def test_flags_and_paths_of_a_listener_that_nobody_needs_are_ignored(bundle: Bundle) -> None:
    flags = ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]
    bundle.linux["seccomp"] = profile(rule("SCMP_ACT_ERRNO", "mkdir"), listenerPath="/nowhere", flags=flags)
    assert bundle.says("echo alive") == "alive\n"


def test_an_agent_that_is_not_there_is_told_before_the_program_begins(bundle: Bundle, tmp_path: Path) -> None:
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir")
    told = bundle.refuses("echo alive")
    assert f"bring the seccomp listener to {tmp_path}/agent" in told and "No such file" in told and "start the agent" in told


def test_a_filter_that_cannot_be_loaded_is_told_with_an_agent_waiting(bundle: Bundle, tmp_path: Path) -> None:
    """The agent is connected and the kernel refuses: a second listener on one process is EBUSY, no right to load is EACCES."""
    bundle.linux["seccomp"] = asking(tmp_path / "agent", "mkdir")
    (bundle.root / ".seccomp").mkdir(parents=True)
    with Agent(tmp_path / "agent", error=None, answers=False):
        bundle.write()
        name = seccomp.key(bundle.linux["seccomp"])
        (bundle.root / ".seccomp" / f"{name}.bpf").write_bytes(bytes(8))
        assert "load the seccomp filter: seccomp(2): Invalid argument" in bundle.refuses("true")


def test_an_agent_may_close_its_end_as_soon_as_it_has_the_listener() -> None:
    ours, theirs = socket.socketpair()

    class Hasty(socket.socket):
        def sendmsg(self, *words: Any) -> int:
            sent = super().sendmsg(*words)
            theirs.close()
            return sent

    with Hasty(fileno=ours.detach()) as agent:
        listener._send(agent, agent.fileno(), b"{}")  # type: ignore[arg-type]  # nacre's own socket class has the same methods
