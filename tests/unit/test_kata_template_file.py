"""Template files: what is written is read again, anything else is refused; a sealed copy cannot be changed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.kata import template
from nacre.kata.machine import Boot, Shape
from nacre.kata.plan import Plan
from nacre.kata.template import TemplateBroken
from nacre.linux.libc import owned

RAM = 4 << 20
PLAN = Plan(
    shape=Shape(qemu="/q", qemu_version="7", accelerator="tcg", ram_bytes=RAM, hot_bytes=0, max_cpus=1),
    boot=Boot(kernel="/k", initrd="/i", cmdline="c"),
    guest="g",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A template of a guest that wrote at two places of its RAM."""
    path = tmp_path / "template"
    with owned(os.memfd_create("ram")) as ram, owned(os.memfd_create("state")) as state:
        os.ftruncate(ram, RAM)
        os.pwrite(ram, b"kernel", 0)
        os.pwrite(ram, b"agent", 3 << 20)
        os.write(state, b"device state")
        with owned(os.open(path, os.O_RDWR | os.O_CREAT)) as fd:
            template._write(fd, PLAN, ram, state)
    return path


def test_ram_and_state_come_back_and_holes_stay_holes(file: Path) -> None:
    with owned(template.open_sealed(str(file))) as sealed:
        found = template.read(sealed)
        assert found.plan == PLAN
        assert os.pread(sealed, 6, 0) == b"kernel" and os.pread(sealed, 5, 3 << 20) == b"agent"
        with owned(template.open_state(sealed, found)) as one, owned(template.open_state(sealed, found)) as other:
            assert os.read(one, 12) == os.read(other, 12) == b"device state", "each has a position of its own"
        assert os.fstat(sealed).st_blocks * 512 < RAM // 4


def test_a_sealed_template_cannot_be_written_by_whoever_opens_it(file: Path) -> None:
    with owned(template.open_sealed(str(file))) as sealed, owned(os.open(f"/proc/self/fd/{sealed}", os.O_RDWR)) as again:
        for change in (lambda: os.pwrite(again, b"x", 0), lambda: os.ftruncate(again, 0)):
            with pytest.raises(OSError) as refused:
                change()
            assert refused.value.errno == errno.EPERM


@pytest.mark.parametrize("place", [0, 100, 3 << 20, RAM + 3])
def test_a_changed_byte_is_noticed_wherever_it_is(file: Path, place: int) -> None:
    with owned(os.open(file, os.O_RDWR)) as fd:
        os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 1]), place)
    with pytest.raises(TemplateBroken, match="bytes have changed"):
        template.open_sealed(str(file))


@pytest.mark.parametrize("size", [0, 10, RAM, RAM + 20])
def test_a_torn_file_is_refused(file: Path, size: int) -> None:
    os.truncate(file, size)
    with pytest.raises(TemplateBroken):
        template.open_sealed(str(file))


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_as_a_template(data: bytes) -> None:
    with owned(os.memfd_create("any")) as fd:
        os.write(fd, data)
        with pytest.raises(TemplateBroken):
            template.read(fd)
