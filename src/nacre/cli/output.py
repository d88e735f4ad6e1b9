"""What a person reads: sentences, tables, failures. `rich` is imported only for a terminal that shows colours, and only here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from nacre.oci.errors import Failure

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"ok": "32", "warn": "33", "bad": "31", "dim": "2", "bold": "1"}


def colours(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that shows colours (NO_COLOR and TERM=dumb are respected)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, style: str, stream: IO[str] | None = None) -> str:
    """`text` in one of the styles ok, warn, bad, dim, bold, where `stream` (stdout) shows it."""
    return f"\033[{_STYLES[style]}m{text}\033[0m" if colours(stream or sys.stdout) else text


def say(text: str = "", style: str = "") -> None:
    print(paint(text, style) if style else text, flush=True)


def failure(failed: Failure, stream: IO[str] | None = None) -> None:
    """The failure whole: what and cause, then the evidence, then the remedy."""
    stream = stream or sys.stderr
    print(paint("error: ", "bad", stream) + str(failed), file=stream)
    for line in failed.evidence:
        print(paint(f"  | {line}", "dim", stream), file=stream)
    if failed.remedy:
        print(paint("remedy: ", "bold", stream) + failed.remedy, file=stream)
    stream.flush()


@contextmanager
def step(text: str) -> Iterator[None]:
    """A line that says what is being done, then how long it took; on failure the line says so and the exception goes on."""
    started = time.monotonic()
    terminal = sys.stdout.isatty()
    if terminal:
        print(f"  … {text}", end="", flush=True)
    try:
        yield
    except BaseException:
        print(("\r" if terminal else "") + f"  {paint('✗', 'bad')} {text}", flush=True)
        raise
    took = time.monotonic() - started
    print(("\r" if terminal else "") + f"  {paint('✓', 'ok')} {text} {paint(f'({seconds(took)})', 'dim')}", flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """A plain aligned table; columns of numbers are right-aligned."""
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in body)]) for i, name in enumerate(columns)]
    right = [bool(body) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in body) for i in range(len(columns))]
    if title:
        say(title, "bold")
    for index, row in enumerate([list(columns), *body]):
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        say("  " + "  ".join(cells).rstrip(), "" if index else "dim")


def console() -> Console:
    """A rich console, for progress bars."""
    from rich.console import Console

    return Console(stderr=True)


def seconds(value: float) -> str:
    """A duration as a person says it."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def size(size_bytes: float) -> str:
    """A number of bytes as a person says it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 100 else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("the loop ends at GiB")
