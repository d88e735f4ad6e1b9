"""`nacre logs`: the daemon's own logs, merged by time; rotation is followed by name."""

from __future__ import annotations

import heapq
import os
import select
from collections.abc import Iterator

import click

from nacre.cli import output
from nacre.config import Config
from nacre.oci.errors import NotFound

COMPONENTS = ("node", "api", "controllers", "kubelet", "cri", "kata")


@click.command()
@click.option("-f", "follow", is_flag=True, help="Go on as lines come.")
@click.option("-n", "--lines", "count", default=50, show_default=True, help="Lines to begin with.")
@click.argument("component", required=False, type=click.Choice(COMPONENTS))
@click.pass_obj
def logs(config: Config, follow: bool, count: int, component: str | None) -> None:
    """The daemon's own logs. Lines of containers: nacre kubectl logs POD."""
    directory = os.path.dirname(config.log_dir)
    names = [component] if component else list(COMPONENTS)
    paths = {name: f"{directory}/{name}.log" for name in names if os.path.exists(f"{directory}/{name}.log")}
    if not paths:
        raise NotFound(what="show logs", cause=f"{directory} has none", remedy="nacre up")
    width = max(map(len, paths))
    for name, line in list(merged(paths))[-count:]:
        _show(name, line, width)
    if follow:
        for name, line in following(paths):
            _show(name, line, width)


def _show(name: str, line: str, width: int) -> None:
    style = {"W": "warn", "E": "bad", "C": "bad"}.get(line[24:25], "") if line[:2] == "20" else "dim"
    print(output.paint(name.ljust(width), "dim"), output.paint(line, style) if style else line, flush=True)


def merged(paths: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(component, line) in the order of their times; a line without a time (a traceback's) stays behind the one before it."""
    return ((name, line) for _time, _number, name, line in heapq.merge(*(_stamped(n, p) for n, p in paths.items())))


def _stamped(name: str, path: str) -> Iterator[tuple[str, int, str, str]]:
    stamp = ""
    for older in (f"{path}.1", path):
        if os.path.exists(older):
            with open(older, errors="replace") as file:
                for number, line in enumerate(file):
                    stamp = line[:23] if line[:2] == "20" else stamp
                    yield stamp, number, name, line.rstrip("\n")


def following(paths: dict[str, str]) -> Iterator[tuple[str, str]]:
    """New lines for ever. Looks four times a second: log files have no descriptor to wait on, and rotation renames them."""
    files = {name: open(path, errors="replace") for name, path in paths.items()}  # noqa: SIM115  # closed below
    try:
        for file in files.values():
            file.seek(0, os.SEEK_END)
        while True:
            for name, path in paths.items():
                yield from ((name, line.rstrip("\n")) for line in files[name])
                if os.path.exists(path) and os.stat(path).st_ino != os.fstat(files[name].fileno()).st_ino:
                    files[name].close()
                    files[name] = open(path, errors="replace")  # noqa: SIM115
            select.select([], [], [], 0.25)
    finally:
        for file in files.values():
            file.close()
