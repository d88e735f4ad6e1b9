"""The command line's words: every line ends in values or in a failure with words, never in a traceback."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nacre.oci.errors import Failure, Invalid
from nacre.runc import main as command
from nacre.runc import options, plan


def test_values_flags_lists_numbers_and_short_forms() -> None:
    chosen, plain = options.parse(
        ["-b", "/x", "--pid-file=p", "--no-pivot", "--preserve-fds", "2", "id"], options.COMMANDS["create"], "create"
    )
    assert chosen == {"bundle": "/x", "pid-file": "p", "no-pivot": True, "preserve-fds": 2} and plain == ["id"]
    chosen, plain = options.parse(["-e", "A=1", "--env", "B=2", "id", "sh", "-c", "x"], options.COMMANDS["exec"], "exec")
    assert chosen["env"] == ["A=1", "B=2"] and plain == ["id", "sh", "-c", "x"], "behind the id the words are the command's"
    chosen, plain = options.parse(["id", "--force"], options.COMMANDS["delete"], "delete")
    assert chosen == {"force": True} and plain == ["id"], "elsewhere options may follow"
    assert options.parse(["--force=false", "id"], options.COMMANDS["delete"])[0] == {"force": False}


@pytest.mark.parametrize(
    ("word", "number"),
    [("KILL", 9), ("SIGKILL", 9), ("kill", 9), ("9", 9), ("0", 0), ("RTMIN+3", signal.SIGRTMIN + 3), ("SIGTERM", 15)],
)
def test_signals_by_name_and_number(word: str, number: int) -> None:
    assert options.signal_number(word) == number


@pytest.mark.parametrize("word", ["", "65", "999", "NOPE", "SIG", "SIG_DFL", "RTMIN+x", "-9", "TERM+1000", "²"])
def test_what_is_no_signal_is_refused(word: str) -> None:
    with pytest.raises(Invalid, match="no such signal"):
        options.signal_number(word)


@pytest.mark.parametrize(
    ("word", "size"), [("1024", 1024), ("1k", 1024), ("2M", 2 << 20), ("1GiB", 1 << 30), ("-1", -1), ("3gb", 3 << 30)]
)
def test_sizes(word: str, size: int) -> None:
    assert options.size(word) == size


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0-2,7", (0, 1, 2, 7)), (" 1, 3 ", (1, 3))])
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert plan.cpus(text, "x") == cpus


@pytest.mark.parametrize("text", ["", "-", "a", "2-1", "1-", "99999", "0-99999999", "²"])
def test_what_is_no_list_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="no list of CPUs"):
        plan.cpus(text, "x")


COMMANDS = [
    "state",
    "start",
    "kill",
    "delete",
    "list",
    "ps",
    "pause",
    "resume",
    "update",
    "events",
    "features",
    "spec",
    "checkpoint",
    "help",
]
FLAGS = sorted(
    {name for table in (options.GLOBAL, *options.COMMANDS.values()) for name in table}
    - {"--log", "--root", "--bundle", "-b", "--config", "--resources", "-r"}
)
WORDS = st.sampled_from([*COMMANDS, *FLAGS, "--", "-", "nobody", "--stats", "[", "json", "\udc80", ""]) | st.text(max_size=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runtime's root without containers, and a working directory where `spec` may write."""
    made = tmp_path_factory.mktemp("options")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=5))
def test_any_command_line_ends_in_an_exit_code_and_words(place: Path, line: list[str]) -> None:
    if {"create", "run", "exec"} & set(line):
        return  # these go on in another interpreter; the fuzzer of documents calls them
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = command.main(["--root", str(place / "state"), *line])
    assert code in (0, 1, 255) and (
        code == 0 or error.getvalue().startswith("nacre-runc: ") or not line or "commands:" in out.getvalue()
    )


@pytest.mark.parametrize(("word", "length"), [("5s", 5), ("500ms", 0.5), ("1m30s", 90), ("1.5h", 5400), ("1h0m1s", 3601)])
def test_durations_are_read_as_go_writes_them(word: str, length: float) -> None:
    assert options.seconds(word) == length


@pytest.mark.parametrize("word", ["", "5", "s", "0s", "-1s", "5 s", "1x", "1.2.3s", "5s3", "٣s", "infs"])
def test_what_is_no_duration_is_refused(word: str) -> None:
    with pytest.raises(Invalid, match="is no duration"):
        options.seconds(word)


STATES = st.dictionaries(
    st.sampled_from(
        [
            "format",
            "id",
            "status",
            "pid",
            "start_time",
            "creator",
            "cgroup",
            "hooks",
            "annotations",
            "created_ns",
            "bundle",
            "rootfs",
        ]
    ),
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATES | st.just({}), st.booleans(), st.binary(max_size=30))
def test_any_state_file_ends_in_a_state_or_words_and_can_be_deleted(
    place: Path, document: dict[str, Any], whole: bool, noise: bytes
) -> None:
    root = place / "damaged"
    directory = root / "web"
    directory.mkdir(parents=True, exist_ok=True)
    base = {"format": 1, "id": "web", "root": str(root), "bundle": "/b", "status": "stopped"}
    (directory / "state.json").write_bytes(json.dumps(base | document).encode() if whole else noise)
    error = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        for line in (["state", "web"], ["list"], ["ps", "-f", "json", "web"]):
            assert command.main(["--root", str(root), *line]) in (0, 1)
        assert command.main(["--root", str(root), "delete", "--force", "web"]) == 0, error.getvalue()
    assert not directory.exists()


def test_a_failure_is_a_sentence() -> None:
    with pytest.raises(Failure):
        options.parse(["--nonsense"], {})
