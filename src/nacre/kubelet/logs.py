"""Container logs as `kubectl logs` asks for them, out of the files that the runtime writes (CRI log format).

A line of a file is `TIME stdout|stderr P|F TEXT`; P is a piece without its end. Files are read backwards for the last lines, forwards
in chunks otherwise, and followed by inotify until `ended` says that nobody writes any more and everything is read.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from nacre.kubelet.times import parse
from nacre.kubelet.watching import FILE, Watching
from nacre.oci.errors import Invalid, NotFound

CHUNK = 64 * 1024
LAST_LINES, LAST_BYTES = 80, 2048  # what FallbackToLogsOnError shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The options of pods/log (core/v1 PodLogOptions)."""

    follow: bool = False
    tail_lines: int | None = None
    since: float = 0.0  # Unix time
    limit_bytes: int | None = None
    timestamps: bool = False
    stream: str = ""  # stdout, stderr, "" for both


def wanted(query: dict[str, str], now: float) -> Wanted:
    """From the query of a request. Raises Invalid in Kubernetes' words."""
    numbers = {}
    for key, least in (("tailLines", 0), ("sinceSeconds", 1), ("limitBytes", 1)):
        if query.get(key):
            if not re.fullmatch("[0-9]{1,18}", query[key]) or int(query[key]) < least:
                bound = "0" if least == 0 else "0, exclusive"
                raise Invalid(
                    what="read logs", cause=f"{key}: Invalid value: {query[key]}: must be greater than or equal to {bound}"
                )
            numbers[key] = int(query[key])
    if "sinceSeconds" in numbers and query.get("sinceTime"):
        raise Invalid(what="read logs", cause="at most one of `sinceTime` or `sinceSeconds` may be specified")
    since = now - numbers["sinceSeconds"] if "sinceSeconds" in numbers else 0.0
    if query.get("sinceTime"):
        try:
            since = parse(query["sinceTime"])
        except ValueError as error:
            raise Invalid(what="read logs", cause=f"sinceTime: {query['sinceTime']} is no time of RFC 3339") from error
    stream = query.get("stream", "").lower()
    if stream not in ("", "all", "stdout", "stderr"):
        raise Invalid(what="read logs", cause=f"stream: Unsupported value: {stream!r}: supported values: All, Stdout, Stderr")
    return Wanted(
        follow=query.get("follow") in ("true", "1"),
        tail_lines=numbers.get("tailLines"),
        since=since,
        limit_bytes=numbers.get("limitBytes"),
        timestamps=query.get("timestamps") in ("true", "1"),
        stream="" if stream == "all" else stream,
    )


def shown(line: bytes, asked: Wanted) -> bytes:
    """What a log line gives to the reader, b"" for nothing; a line that is not of the format is shown as it is."""
    parts = line.split(b" ", 3)
    if len(parts) < 4:
        return line + b"\n"
    at, stream, tags, text = parts
    if asked.stream and stream.decode(errors="replace") != asked.stream:
        return b""
    if asked.since and _time_of(at) < asked.since:
        return b""
    text += b"\n" if tags.split(b":")[0] == b"F" else b""
    return at + b" " + text if asked.timestamps else text


def _time_of(stamp: bytes) -> float:
    text = stamp.decode("ascii", errors="replace")
    try:
        fraction = text[19:].rstrip("Z").partition("+")[0]
        return parse(text) + (float("0" + fraction) if fraction.startswith(".") else 0.0)
    except ValueError:
        return float("inf")  # a time nobody can read is never too old


async def read(
    path: str, asked: Wanted, watching: Watching, ended: Callable[[], bool], wake: asyncio.Event
) -> AsyncGenerator[bytes, None]:
    """The log's text in pieces. `ended` tells whether the container is over; `wake` is set when that may have changed.

    Raises NotFound when there is no file.
    """
    log = Log(path)
    try:
        if asked.tail_lines is not None:
            log.seek_tail(asked.tail_lines)
        left = asked.limit_bytes
        while True:
            over, replaced = ended(), log.is_replaced()  # asked before reading: what was written until then is read below
            for piece in log.pieces(asked, last=not replaced and (over or not asked.follow)):
                yield piece if left is None else piece[:left]
                left = None if left is None else left - len(piece)
                if left is not None and left <= 0:
                    return
            if replaced:
                log.reopen()
            elif over or not asked.follow:
                return
            else:
                await _changed(log, watching, wake, ended)
    finally:
        log.close()


async def _changed(log: Log, watching: Watching, wake: asyncio.Event, ended: Callable[[], bool]) -> None:
    """Until the file has grown or was replaced, or the container may have ended."""
    with ExitStack() as watches:
        try:
            event = watches.enter_context(watching.changes(log.path, FILE))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            event = asyncio.Event()  # at the pod's end: only `wake` will tell
        wake.clear()
        if log.has_more() or ended():
            return  # it happened before the watch stood
        either = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(wake.wait())]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in either:
                one.cancel()


class Log:
    """An open log file; owns its descriptor, which a rotation replaces."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._kept = b""  # a line that has no end yet
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(what=f"read {path}", cause="the log file is not there (any more)") from error

    def close(self) -> None:
        os.close(self._fd)

    def seek_tail(self, lines: int) -> None:
        os.lseek(self._fd, tail_offset(self._fd, lines), os.SEEK_SET)

    def pieces(self, asked: Wanted, *, last: bool) -> Iterator[bytes]:
        """What can be read now, a piece a chunk; with `last` also a line without its end."""
        while data := os.read(self._fd, CHUNK):
            *lines, self._kept = (self._kept + data).split(b"\n")
            piece = b"".join(shown(line, asked) for line in lines)
            if piece:
                yield piece
        if last and self._kept:
            kept, self._kept = self._kept, b""
            yield shown(kept, asked)

    def has_more(self) -> bool:
        return os.fstat(self._fd).st_size > os.lseek(self._fd, 0, os.SEEK_CUR) or self.is_replaced()

    def reopen(self) -> None:
        """Go on with the file that has the path now."""
        fresh = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        os.close(self._fd)
        self._fd = fresh

    def is_replaced(self) -> bool:
        """Whether another file has the path: then nobody writes to this one any more."""
        try:
            return os.stat(self.path).st_ino != os.fstat(self._fd).st_ino
        except FileNotFoundError:
            return False


def tail_offset(fd: int, lines: int) -> int:
    """Where the last `lines` lines of the file begin; as in every kubelet, a piece (P) counts as a line."""
    stop = os.fstat(fd).st_size
    if lines == 0:
        return stop
    if stop and os.pread(fd, 1, stop - 1) == b"\n":
        stop -= 1
    while stop > 0:
        start = max(0, stop - CHUNK)
        block = os.pread(fd, stop - start, start)
        cut = len(block)
        while (cut := block.rfind(b"\n", 0, cut)) >= 0:
            lines -= 1
            if lines == 0:
                return start + cut + 1
        stop = start
    return 0


def last_words(path: str) -> str:
    """The end of a log, for a termination message: LAST_LINES lines, at most LAST_BYTES."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(tail_offset(file.fileno(), LAST_LINES))
            text = b"".join(shown(line, Wanted()) for line in file.read().splitlines())
    except OSError:
        return ""
    return text[-LAST_BYTES:].decode(errors="replace")
