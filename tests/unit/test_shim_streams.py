"""Log lines out of bytes, and streams that wait for room instead of blocking their shim."""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.shim.loop import Loop
from nacre.shim.streams import CHUNK, Input, Log, Splitter, Stream, stamp

LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z stdout ([PF]) (.*)", re.DOTALL)
PIECES = st.lists(
    st.one_of(st.binary(max_size=64), st.just(b"\n"), st.just(b"x" * CHUNK), st.just(b"y" * (CHUNK + 1))), max_size=12
)


@given(PIECES)
def test_whatever_is_written_comes_back_from_the_log_in_lines_of_bounded_length(pieces: list[bytes]) -> None:
    splitter = Splitter("stdout")
    written = b"".join(splitter.feed(piece, 1) for piece in pieces) + splitter.end(2)
    back = b""
    for line in written.split(b"\n")[:-1]:
        match = LINE.fullmatch(line)
        assert match is not None and len(match[2]) <= CHUNK
        back += match[2] + (b"\n" if match[1] == b"F" else b"")
    assert back == b"".join(pieces)


@given(st.lists(st.binary(max_size=5000), max_size=8), st.integers(min_value=1, max_value=4000))
def test_how_the_bytes_are_cut_up_makes_no_difference(pieces: list[bytes], cut: int) -> None:
    whole, parts = Splitter("stdout"), Splitter("stdout")
    data = b"".join(pieces)
    one = whole.feed(data, 1) + whole.end(1)
    other = b"".join(parts.feed(data[at : at + cut], 1) for at in range(0, len(data), cut)) + parts.end(1)
    assert one == other


def test_a_stamp_is_rfc_3339_with_nanoseconds() -> None:
    assert stamp(1_700_000_000_000_000_042) == b"2023-11-14T22:13:20.000000042Z"


@pytest.fixture
def loop() -> Iterator[Loop]:
    yield Loop(lambda _pid, _status: None)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def turn(loop: Loop) -> None:
    """Everything that is ready now, until nothing is."""
    while ready := loop._selector.select(0):
        for key, _events in ready:
            key.data()


def test_a_client_that_does_not_read_stops_the_stream_and_gets_every_byte_later(loop: Loop, tmp_path: Path) -> None:
    read, write = os.pipe()
    client, outlet = os.pipe()
    log = Log(str(tmp_path / "log"), lambda _why: None)
    ended: list[Stream] = []
    stream = Stream(loop, read, "stdout", log, ended.append)
    stream.attach(outlet)
    os.set_blocking(write, False)
    sent = 0
    try:
        while True:
            sent += os.write(write, b"0123456789abcde\n" * 256)
            turn(loop)
    except BlockingIOError:
        pass  # the client's pipe, then ours: full
    os.close(write)
    heard = b""
    while len(heard) < sent:
        heard += os.read(client, 1 << 16)
        turn(loop)
    turn(loop)
    assert heard == b"0123456789abcde\n" * (sent // 16)
    assert ended == [stream] and os.read(client, 1) == b""
    log.close()
    os.close(client)


def test_what_a_client_has_seen_is_in_the_log(loop: Loop, tmp_path: Path) -> None:
    seen_first: list[bool] = []

    class Watched(Log):
        def write(self, lines: bytes) -> bool:
            seen_first.append(bool(select.select([client], [], [], 0)[0]))
            return super().write(lines)

    read, write = os.pipe()
    client, outlet = os.pipe()
    log = Watched(str(tmp_path / "log"), lambda _why: None)
    stream = Stream(loop, read, "stdout", log, lambda _stream: None)
    stream.attach(outlet)
    os.write(write, b"a line\n")
    turn(loop)
    assert os.read(client, 100) == b"a line\n" and seen_first == [False]
    stream.close()
    log.close()
    os.close(client)
    os.close(write)


def test_input_waits_for_room_and_its_last_source_ends_it(loop: Loop) -> None:
    read, write = os.pipe()
    source, feed = os.pipe()
    made = Input(loop, write)
    made.feed(source, last=True)
    data = os.urandom(1 << 20)
    os.set_blocking(feed, False)
    heard, sent = b"", 0
    while len(heard) < len(data):
        if sent < len(data):
            try:
                sent += os.write(feed, data[sent : sent + (1 << 16)])
            except BlockingIOError:
                heard += os.read(read, 1 << 16)
            if sent == len(data):
                os.close(feed)
        else:
            heard += os.read(read, 1 << 16)
        turn(loop)
    turn(loop)
    assert heard == data and os.read(read, 1) == b"" and made.fd == -1
    os.close(read)


def test_a_callback_that_raises_is_written_down_and_the_loop_goes_on(loop: Loop, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("told")

    loop.later(0, fail)
    loop.later(0.01, loop.end)
    loop.run()
    assert "RuntimeError: told" in capsys.readouterr().err


def test_a_log_that_is_blocked_says_so_once_and_keeps_what_it_was_given(tmp_path: Path) -> None:
    said: list[str] = []
    log = Log("/dev/full", said.append)
    assert not log.write(b"one\n") and not log.write(b"two\n")
    assert said == ["No space left on device"]
    log.path = str(tmp_path / "log")
    log.reopen()
    assert log.write(b"three\n") and said[-1] == ""
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"
    log.close()
