"""What an engine costs: CPU time and private memory of everything in its cgroup, and its syncs, counted by strace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable

from nacre.cli.bench.engine import CGROUP, Engine

SYNCS = ("fdatasync", "fsync", "sync_file_range", "syncfs")


def cpu_ms(engine: Engine) -> float:
    """CPU time of the engine, its pods and everything that has ended in them, since the cgroup was made."""
    return int(engine.group.stats()["cpu_ns"]) / 1e6


def processes(engine: Engine) -> list[int]:
    """Every living process in or below the engine's cgroup."""
    mark, found = f"{CGROUP}/{engine.name}", []
    for text in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{text}/cgroup") as file:
                if any(mark in line for line in file):
                    found.append(int(text))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def private_kib(engine: Engine) -> int:
    """Private memory of all of them."""
    return sum(rollup(pid, "Private_Clean") + rollup(pid, "Private_Dirty") for pid in processes(engine))


def rollup(pid: int, key: str) -> int:
    """A line of /proc/PID/smaps_rollup, in KiB; 0 when the process is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(key + ":"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def syncs(engine: Engine, work: Callable[[], None]) -> int | None:
    """How often the engine's processes (and those they start) sync while `work` runs; None where strace is not to be had."""
    strace = shutil.which("strace")
    if not strace:
        return None
    targets = [word for pid in processes(engine) for word in ("-p", str(pid))]
    counter = subprocess.Popen(
        [strace, "-f", "-c", "-U", "name,calls", "-e", f"trace={','.join(SYNCS)}", *targets], stderr=subprocess.PIPE, text=True
    )
    assert counter.stderr is not None
    try:
        attached = counter.stderr.readline()  # "strace: Process N attached": from here on it counts
        if "attached" not in attached:
            return None
        work()
    finally:
        counter.send_signal(signal.SIGINT)
        rest = counter.stderr.read()
        counter.wait(timeout=30)
    return sum(int(row.split()[1]) for row in rest.splitlines() if row.split()[:1] and row.split()[0] in SYNCS)
