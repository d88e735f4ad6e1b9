"""A shim's set-up children: what they answer, how long they stay, and what is said when they have left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from nacre.oci.errors import Failure, Invalid
from nacre.shim.processes import Child, ChildDied, in_child


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def refuse() -> tuple[dict[str, Any], list[int]]:
    raise Invalid(what="do it", cause="it is wrong")


def test_a_child_that_is_asked_does_the_second_thing_in_the_process_of_the_first(sleeper: subprocess.Popen[bytes]) -> None:
    read, write = os.pipe()
    child = Child(
        "make",
        lambda: ({"pid": sleeper.pid, "by": os.getpid()}, []),
        lambda: ({"written": os.write(write, str(os.getpid()).encode())}, []),
        keep=[write],
    )
    answer, _none = child.hear("make")
    assert child.go_on("start")
    assert os.read(read, 20).decode() == str(answer["by"]) != str(os.getpid())
    os.close(read)
    os.close(write)


def test_a_child_leaves_with_the_process_that_it_made_and_says_no_when_it_is_asked(sleeper: subprocess.Popen[bytes]) -> None:
    child = Child("make", lambda: ({"pid": sleeper.pid, "by": os.getpid()}, []), lambda: ({}, []))
    answer, _none = child.hear("make")
    sleeper.kill()
    os.waitid(os.P_PID, answer["by"], os.WEXITED | os.WNOWAIT)
    assert not child.go_on("start")


def test_a_child_holds_of_our_descriptors_what_it_was_given_alone() -> None:
    given, other = os.pipe()
    answer, _none = in_child("look", lambda: ({"open": os.listdir("/proc/self/fd")}, []), keep=[given])
    numbers = {int(name) for name in answer["open"]}
    assert given in numbers and other not in numbers
    assert len(numbers - {0, 1, 2, given}) == 2  # the socket it answers by, and the listing itself
    os.close(given)
    os.close(other)


def test_the_second_thing_raises_what_it_raised(sleeper: subprocess.Popen[bytes]) -> None:
    child = Child("make", lambda: ({"pid": sleeper.pid}, []), refuse)
    child.hear("make")
    with pytest.raises(Failure, match="it is wrong"):
        child.go_on("start")


def test_a_child_that_is_not_asked_ends_when_it_is_hung_up_on(sleeper: subprocess.Popen[bytes]) -> None:
    child = Child("make", lambda: ({"pid": sleeper.pid}, []), refuse)
    child.hear("make")
    assert child.end() == 0


def test_a_child_that_is_killed_at_its_work_is_told_with_its_code() -> None:
    with pytest.raises(ChildDied, match="137"):
        in_child("make", lambda: os.kill(os.getpid(), 9))  # type: ignore[arg-type,return-value]  # it never answers
