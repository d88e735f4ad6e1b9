"""The demo's look round from inside a login: it finds what is there, and not itself."""

from __future__ import annotations

import secrets
import subprocess
import sys

from nacre.cli.demo import login


def found(word: str) -> list[str]:
    (line,) = [line for line in login.look_for(word).splitlines() if "grep -slF" in line]
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_look_round_finds_a_process_by_its_word_and_neither_its_shell_nor_its_grep() -> None:
    word = f"nacre-test-{secrets.token_hex(8)}"
    assert found(word) == []
    with subprocess.Popen([sys.executable, "-c", "input()", word], stdin=subprocess.PIPE) as process:
        assert found(word) == [f"found /proc/{process.pid}/cmdline"]
