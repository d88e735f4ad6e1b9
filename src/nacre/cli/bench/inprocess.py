"""The path that shims take, alone: an interpreter with the runtime loaded forks a child for each act, as a zygote does.

Executed as a file by `oci`, so that nothing of the command line is loaded. One act a line on stdin, `ACT ROOT BUNDLE ID`; the answer is
`WALL_MS CPU_MS PEAK_KIB` of the forked child, or `! WORDS`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable

from nacre import runc
from nacre.oci.errors import Failure

runc.load()
_NOTHING = (None, None, None)


def _run(root: str, bundle: str, name: str) -> None:
    launch = runc.create(root, name, bundle, stdio=_NOTHING)
    runc.start(root, name)
    os.waitpid(launch.pid, 0)
    runc.delete(root, name)


def _life(root: str, bundle: str, name: str) -> None:
    launch = runc.create(root, name, bundle, stdio=_NOTHING)
    runc.start(root, name)
    runc.delete(root, name, force=True)
    os.waitpid(launch.pid, 0)


def _exec(root: str, bundle: str, name: str) -> None:
    with open(f"{bundle}/process.json", encoding="utf-8") as file:
        process = json.load(file)
    launch = runc.execute(root, name, process, stdio=_NOTHING)
    os.waitpid(launch.pid, 0)


def _state(root: str, _bundle: str, name: str) -> None:
    json.dumps(runc.state(root, name))


ACTS: dict[str, Callable[[str, str, str], None]] = {"run": _run, "life": _life, "exec": _exec, "state": _state}


def measured(act: str, *words: str) -> str:
    """One act in a forked child; what it took."""
    read, write = os.pipe2(os.O_CLOEXEC)
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            ACTS[act](*words)
        except (Failure, OSError) as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    _, _, usage = os.wait4(pid, 0)
    took = time.perf_counter() - began
    os.close(write)
    with os.fdopen(read) as answer:
        wrong = answer.read()
    return f"! {wrong}" if wrong else f"{took * 1000:.4f} {(usage.ru_utime + usage.ru_stime) * 1000:.4f} {usage.ru_maxrss}"


def main() -> None:
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(measured(*line.split()).replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
