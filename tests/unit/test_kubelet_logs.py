"""Container logs: options, lines, tails, following."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.kubelet.logs import Wanted, last_words, read, shown, tail_offset, wanted
from nacre.kubelet.watching import Watching
from nacre.oci.errors import Invalid, NotFound

STAMP = "2026-01-01T00:00:0{}.500000000Z"
LOG = "".join(f"{STAMP.format(number)} {'stderr' if number % 2 else 'stdout'} F line {number}\n" for number in range(5))


def collected(path: Path, asked: Wanted) -> bytes:
    async def body() -> bytes:
        watching = Watching()
        return b"".join([piece async for piece in read(str(path), asked, watching, lambda: True, asyncio.Event())])

    return asyncio.run(body())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "0.log"
    path.write_text(LOG)
    return path


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Wanted(), "line 0\nline 1\nline 2\nline 3\nline 4\n"),
        (Wanted(tail_lines=2), "line 3\nline 4\n"),
        (Wanted(tail_lines=0), ""),
        (Wanted(tail_lines=99, limit_bytes=9), "line 0\nli"),
        (Wanted(stream="stderr"), "line 1\nline 3\n"),
        (Wanted(since=1_767_225_603.0), "line 3\nline 4\n"),
        (Wanted(tail_lines=1, timestamps=True), STAMP.format(4) + " line 4\n"),
    ],
)
def test_options_choose_what_is_shown(log: Path, asked: Wanted, expected: str) -> None:
    assert collected(log, asked).decode() == expected


def test_pieces_of_a_long_line_are_put_together() -> None:
    assert shown(b"T stdout P half ", Wanted()) + shown(b"T stdout F done", Wanted()) == b"half done\n"


def test_a_line_that_has_no_end_yet_is_shown_at_the_end(log: Path) -> None:
    with log.open("a") as file:
        file.write(f"{STAMP.format(5)} stdout P torn")
    assert collected(log, Wanted(tail_lines=1)) == b"torn"


def test_options_are_refused_in_kubernetes_words() -> None:
    assert wanted({"tailLines": "3", "follow": "true", "sinceSeconds": "5"}, 100.0) == Wanted(
        tail_lines=3, follow=True, since=95.0
    )
    for query in (
        {"tailLines": "-1"},
        {"limitBytes": "0"},
        {"sinceTime": "yesterday"},
        {"sinceSeconds": "1", "sinceTime": "x"},
        {"stream": "x"},
    ):
        with pytest.raises(Invalid):
            wanted(query, 0.0)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        collected(tmp_path / "none.log", Wanted())


def test_a_followed_log_is_told_of_new_lines_and_rotation_and_ends_with_its_container(log: Path) -> None:
    async def body() -> list[str]:
        watching, wake, over = Watching(), asyncio.Event(), False
        lines = read(str(log), Wanted(follow=True, tail_lines=0), watching, lambda: over, wake)
        got = []
        first = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        with log.open("a") as file:
            file.write(f"{STAMP.format(5)} stdout F more\n")
        got.append((await asyncio.wait_for(first, 5)).decode())
        second = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        log.rename(log.with_suffix(".old"))
        log.write_text(f"{STAMP.format(6)} stdout F rotated\n")
        wake.set()
        got.append((await asyncio.wait_for(second, 5)).decode())
        last = asyncio.ensure_future(anext(lines, b""))
        await asyncio.sleep(0)
        over = True
        wake.set()
        got.append((await asyncio.wait_for(last, 5)).decode())
        watching.close()
        return got

    assert asyncio.run(body()) == ["more\n", "rotated\n", ""]


def test_what_is_written_just_before_a_rotation_is_followed_too(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.read

    def late(fd: int, size: int) -> bytes:
        """At the file's end, one more line comes and the file is rotated: the instant that a reader cannot see."""
        data = plain(fd, size)
        if not data:
            monkeypatch.setattr(os, "read", plain)
            with log.open("a") as file:
                file.write(f"{STAMP.format(5)} stdout F late\n")
            log.rename(log.with_suffix(".old"))
            log.write_text(f"{STAMP.format(6)} stdout F rotated\n")
        return data

    async def body() -> list[str]:
        watching = Watching()
        lines = read(str(log), Wanted(follow=True, tail_lines=0), watching, lambda: False, asyncio.Event())
        got = []
        async with contextlib.aclosing(lines), asyncio.timeout(5):
            monkeypatch.setattr(os, "read", late)
            while len(got) < 2:
                got.append((await anext(lines)).decode())
        watching.close()
        return got

    assert asyncio.run(body()) == ["late\n", "rotated\n"]


@given(
    st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(0, 40), st.booleans()
)
def test_a_tail_begins_where_the_last_lines_do(lines: list[bytes], count: int, whole: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if whole and lines else b"")
    fd = os.memfd_create("log")
    try:
        os.write(fd, data)
        split = data.split(b"\n")
        split = split[:-1] if split[-1] == b"" else split
        tail = data[tail_offset(fd, count) :]
        assert tail.rstrip(b"\n") == b"\n".join(split[len(split) - min(count, len(split)) :]).rstrip(b"\n")
    finally:
        os.close(fd)


@given(st.binary(max_size=200))
def test_no_line_breaks_the_reader(line: bytes) -> None:
    shown(line.replace(b"\n", b""), Wanted(since=1.0, timestamps=True, stream="stdout"))


def test_last_words_are_the_end_of_the_log(log: Path, tmp_path: Path) -> None:
    assert last_words(str(log)).endswith("line 4\n")
    assert last_words(str(tmp_path / "none")) == ""
