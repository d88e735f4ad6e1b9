"""How little memory a guest lives in, and how it ends when told: a guest of its own, which does not survive the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import guest_support as support
import pytest
from guest_support import Guest

MEMORY_MIB = 96


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Guest]:
    booted = support.boot(support.appliance_for_tests(), tmp_path, memory_mib=MEMORY_MIB)
    try:
        support.hello(booted)
        yield booted
    finally:
        booted.close()


def test_a_guest_of_96_mib_warms_up_and_powers_off_when_told(small: Guest) -> None:
    small.call("warm")
    small.call("shutdown")
    assert small.process.wait(30) == 0
