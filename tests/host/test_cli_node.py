"""The daemon's life as commands see it, with the API server alone: quick, and without touching the kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nacre import config
from nacre.cli import control, lifecycle, main, node, reset
from nacre.config import Config


@contextmanager
def daemon(settings: Config) -> Iterator[dict[str, Any]]:
    """A daemon with the API alone; what it reported last."""
    read, write = os.pipe()
    words = [sys.executable, "-m", "nacre.cli.node", "--prefix", settings.prefix, "--only", "api", "--report-fd", str(write)]
    process = subprocess.Popen(words, pass_fds=(write,), env=os.environ | {"NACRE_NODE": settings.instance})
    os.close(write)
    with open(read) as lines:
        reports = [json.loads(line) for line in lines]
    try:
        yield reports[-1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def settings(prefix: Path) -> Config:
    return config.load(str(prefix))


def test_a_daemon_reports_ready_and_answers_status_until_it_is_down(settings: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(settings) as report:
        assert report["ready"]["services"] == ["api"]
        assert node.alive(settings) == report["ready"]["pid"]
        lifecycle.stop(settings)
        assert node.alive(settings) == 0
        assert control.running(settings) is None
        assert sorted(os.listdir(settings.state)) in ([], ["trace"])
    assert "The node is down" in capsys.readouterr().out


def test_a_second_daemon_names_the_first(settings: Config) -> None:
    with daemon(settings) as first, daemon(settings) as second:
        assert second["failure"]["code"] == "AlreadyExists"
        assert f"pid {first['ready']['pid']}" in second["failure"]["cause"]


def test_after_a_kill_the_next_daemon_has_the_same_ports(settings: Config) -> None:
    with daemon(settings) as first:
        os.kill(first["ready"]["pid"], signal.SIGKILL)
    with daemon(settings) as second:
        assert second["ready"]["api_port"] == first["ready"]["api_port"]


def test_reset_after_a_kill_leaves_no_file(settings: Config, prefix: Path) -> None:
    with daemon(settings) as report:
        os.kill(report["ready"]["pid"], signal.SIGKILL)
    assert main.run(["reset", "--yes"]) == 0
    assert list(prefix.iterdir()) == []


def test_reset_keeps_what_the_user_put_beside_it(settings: Config, prefix: Path) -> None:
    (prefix / "etc/nacre").mkdir(parents=True)
    (prefix / "etc/nacre/config.toml").write_text("[kata]\npool = 0\n")
    with daemon(settings):
        assert main.run(["reset", "--yes"]) == 0
    assert [str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()] == ["etc/nacre/config.toml"]
    assert not reset.paths(settings)
