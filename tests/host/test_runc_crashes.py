"""A kill -9 at any system call that matters: what is left can always be finished or taken away (strace does the killing)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from runc_support import REPOSITORY, RUNC, Bundle, leftovers, made

STRACE = shutil.which("strace") or str(REPOSITORY / ".cache" / "peers" / "wrappers" / "strace")
PARENT = [
    ("mkdir", 1),
    ("mkdir", 3),
    ("rename", 1),
    ("bind", 1),
    ("clone3", 1),
    ("recvmsg", 1),
    ("sendto", 1),
    ("rename", 2),
]
CHILD = ["setsid", "sethostname", "pivot_root", "move_mount", "umount2", "unshare", "mknodat"]


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def killing(bundle: Bundle, call: str, when: int, *, children: bool) -> Bundle:
    """The runtime under strace, which kills it as it makes `call` for the `when`-th time: before the call has its effect."""
    words = (
        STRACE,
        "-q",
        "-o",
        "/dev/null",
        *(("-f",) if children else ()),
        "-e",
        f"inject={call}:signal=KILL:when={when}",
        RUNC,
    )
    return Bundle(**{**vars(bundle), "runtime": words})


@pytest.mark.parametrize(("call", "when"), PARENT)
def test_a_creator_killed_at_any_point_leaves_nothing_that_delete_does_not_take(bundle: Bundle, call: str, when: int) -> None:
    bundle.write()
    done = killing(bundle, call, when, children=False).call(
        "create", "-b", str(bundle.path), bundle.name, stdout=None, stderr=None, capture_output=False
    )
    assert done.returncode == -9, "the point is not on the way"
    for state in json.loads(bundle.ok("list", "-f", "json")):
        assert state["status"] in ("stopped", "created")
    bundle.ok("delete", "--force", bundle.name)
    assert leftovers(bundle) == []
    assert bundle.run("echo anew").stdout == "anew\n"


@pytest.mark.parametrize("call", CHILD)
def test_a_child_killed_in_any_step_fails_the_create_with_words_and_leaves_nothing(bundle: Bundle, call: str) -> None:
    bundle.write()
    done = killing(bundle, call, 1, children=True).call("create", "-b", str(bundle.path), bundle.name)
    assert done.returncode == 1 and "killed by SIGKILL" in done.stderr, done.stderr
    assert leftovers(bundle) == []


@pytest.mark.parametrize(("call", "when"), [("connect", 1), ("sendto", 1), ("recvfrom", 1), ("rename", 1)])
def test_a_starter_killed_at_any_point_leaves_a_container_that_runs_or_can_be_started(
    bundle: Bundle, call: str, when: int
) -> None:
    bundle.script("echo once; exec sleep 100").create()
    assert killing(bundle, call, when, children=False).call("start", bundle.name).returncode == -9
    if bundle.state()["status"] == "created":
        bundle.ok("start", bundle.name)
    assert bundle.state()["status"] in ("running", "stopped")
    bundle.ok("delete", "--force", bundle.name)


@pytest.mark.parametrize(("call", "when"), [("rmdir", 1), ("unlink", 1), ("pidfd_send_signal", 1)])
def test_a_deleter_killed_at_any_point_can_be_called_again(bundle: Bundle, call: str, when: int) -> None:
    bundle.up()
    assert killing(bundle, call, when, children=False).call("delete", "--force", bundle.name).returncode == -9
    bundle.ok("delete", "--force", bundle.name)
    assert leftovers(bundle) == []


def test_a_creator_killed_while_a_hook_runs_takes_the_container_with_it(bundle: Bundle) -> None:
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "kill -KILL $PPID"]}]}
    bundle.write()
    assert bundle.call("create", "-b", str(bundle.path), bundle.name).returncode == -9
    assert bundle.state()["status"] == "stopped"
    bundle.ok("delete", bundle.name)
    assert leftovers(bundle) == []
