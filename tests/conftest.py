"""Shared by all tests: what this machine can do is probed by doing it, and a skip names the call that was refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from nacre.linux import interpreter

# the machine may be busy with virtual machines: how long an example takes says nothing about the code
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

NEEDS_ROOT = ("host", "vm", "interop")
INTERPRETER_HELD_BEFORE = os.path.exists(interpreter.HELD)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests under tests/{host,vm,interop} touch the kernel; without root they are skipped with that word."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason=f"geteuid() is {os.geteuid()}: needs root")
    root = Path(str(config.rootpath)) / "tests"
    for item in items:
        if item.path.relative_to(root).parts[0] in NEEDS_ROOT:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The one thing that nacre-runc leaves by design goes too, when these tests have brought it."""
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput") and not INTERPRETER_HELD_BEFORE:
        interpreter.let_go()


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node's prefix of its own, also in the environment; nothing of the node may be left at the end."""
    monkeypatch.setenv("NACRE_PREFIX", str(tmp_path))
    yield tmp_path
    from nacre import config
    from nacre.cli import host

    settings = config.Config(prefix=os.path.realpath(tmp_path))
    assert not host.mounts(settings), "mounts are left under the prefix"
    assert not host.links(settings), "links are left"
    assert not host.cgroup_directories(settings), "cgroups are left"
