"""Debian's conmon alone over nacre-runc, called as CRI-O and podman call it."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines_support import RUNTIME, environment, found, group, sweep, traces

from nacre.cli.bench.engine import find_busybox
from nacre.runc import templates


class Watched:
    """One container under a conmon of its own."""

    def __init__(self, place: Path) -> None:
        self.place, self.name = place, "watched"
        rootfs = place / "rootfs"
        for name in ("bin", "dev", "proc", "sys", "tmp"):
            (rootfs / name).mkdir(parents=True)
        (rootfs / "bin/sh").write_bytes(Path(find_busybox()).read_bytes())
        (rootfs / "bin/sh").chmod(0o755)
        (place / "exits").mkdir()

    def runc(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(RUNTIME), "--root", str(self.place / "state"), *words]
        return subprocess.run(command, env=environment(self.place), capture_output=True, text=True, check=False, timeout=60)

    def create(self, script: str, *, terminal: bool = False) -> int:
        """conmon creates the container; the pid that it reports on its sync pipe."""
        config = templates.spec(rootless=False)
        config["process"] |= {"args": ["sh", "-c", script], "terminal": terminal, "env": ["PATH=/bin"], "rlimits": []}
        config["linux"]["cgroupsPath"] = f"{group(self.place)}/{self.name}"
        (self.place / "config.json").write_text(json.dumps(config))
        read, write = os.pipe()
        options = {"-c": self.name, "-u": self.name, "-n": self.name, "-r": str(RUNTIME), "-b": str(self.place)}
        options |= {"-p": f"{self.place}/pidfile", "-P": f"{self.place}/conmon.pid", "-l": f"k8s-file:{self.place}/log"}
        options |= {"--exit-dir": f"{self.place}/exits", "--socket-dir-path": str(self.place), "--persist-dir": str(self.place)}
        words = [word for pair in options.items() for word in pair]
        words += [f"--runtime-arg=--root={self.place}/state", "--full-attach", *(["-t"] if terminal else [])]
        settings = environment(self.place) | {"_OCI_SYNCPIPE": str(write), "XDG_RUNTIME_DIR": str(self.place)}
        subprocess.run(
            [found("conmon"), *words], env=settings, pass_fds=(write,), check=True, timeout=60, stdin=subprocess.DEVNULL
        )
        os.close(write)
        with os.fdopen(read) as answers:
            report = json.loads(answers.readline())
        assert report["pid"] > 0, report["message"]
        return int(report["pid"])

    def ended(self) -> str:
        """The exit code that conmon wrote, once it has ended."""
        pid = int((self.place / "conmon.pid").read_text())
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return (self.place / "exits" / self.name).read_text()
        try:
            assert select.select([pidfd], [], [], 30)[0], "conmon does not end"
        finally:
            os.close(pidfd)
        return (self.place / "exits" / self.name).read_text()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    one = Watched(tmp_path)
    try:
        yield one
    finally:
        one.runc("delete", "--force", one.name)
        left = traces(tmp_path)
        sweep(tmp_path)
        assert left == [], left


def test_conmon_creates_logs_and_reports_the_exit_code(watched: Watched) -> None:
    pid = watched.create("echo out; echo err >&2; exit 3")
    assert json.loads(watched.runc("state", watched.name).stdout)["status"] == "created"
    assert (watched.place / "pidfile").read_text() == str(pid)
    assert watched.runc("start", watched.name).returncode == 0
    assert watched.ended() == "3"
    lines = [line.split(" ", 3)[1:] for line in (watched.place / "log").read_text().splitlines()]
    assert sorted(lines) == [["stderr", "F", "err"], ["stdout", "F", "out"]]


@pytest.mark.slow
def test_a_terminal_reaches_conmon_through_the_console_socket(watched: Watched) -> None:
    watched.create("test -t 0 && test -t 1 && echo a terminal; exit 4", terminal=True)
    assert watched.runc("start", watched.name).returncode == 0
    assert watched.ended() == "4"
    assert "stdout F a terminal" in (watched.place / "log").read_text()


@pytest.mark.slow
def test_a_create_that_fails_reaches_conmons_caller_with_nacres_words(watched: Watched) -> None:
    (watched.place / "rootfs").rename(watched.place / "elsewhere")
    with pytest.raises(AssertionError, match="rootfs: No such file or directory"):
        watched.create("true")
