"""A shim's set-up children: what they hold, what they answer, and what is said when they die."""

from __future__ import annotations

import os
from typing import Any

import pytest

from nacre.oci.errors import Invalid
from nacre.shim.processes import ChildDied, in_child


def refuse() -> tuple[dict[str, Any], list[int]]:
    raise Invalid(what="do it", cause="it is wrong")


def test_a_child_holds_of_our_descriptors_what_it_was_given_alone() -> None:
    given, other = os.pipe()
    answer, _none = in_child("look", lambda: ({"open": os.listdir("/proc/self/fd")}, []), keep=[given])
    numbers = {int(name) for name in answer["open"]}
    assert given in numbers and other not in numbers
    assert len(numbers - {0, 1, 2, given}) == 2  # the socket it answers by, and the listing itself
    os.close(given)
    os.close(other)


def test_what_a_child_raises_is_raised_here() -> None:
    with pytest.raises(Invalid, match="it is wrong"):
        in_child("do it", refuse)


def test_a_child_that_is_killed_at_its_work_is_told_with_its_code() -> None:
    with pytest.raises(ChildDied, match="137"):
        in_child("make", lambda: os.kill(os.getpid(), 9))  # type: ignore[arg-type,return-value]  # it never answers
