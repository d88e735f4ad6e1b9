"""`nacre bench oci`: nacre-runc beside Debian's runc and crun: one bundle, each act of each in turn, the order turned each round.

    nacre-runc  the command, as pip installed it
    in process  the same code from a forked zygote, as a shim calls it (`inprocess`)

CPU time is of everything that an act started, the container's processes included: they are reaped here. Peak memory is the largest
process of the command, from a run that is not timed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import click

from nacre.cli import output
from nacre.cli.bench import engine, inprocess, report
from nacre.cli.privilege import require_root
from nacre.linux import cgroups, mounts, namespaces, process
from nacre.oci.errors import Failure, NotFound
from nacre.runc import templates

CGROUP = "/nacre-bench-oci"
ACTS = {"run": "run /bin/true", "life": "create, start, delete", "exec": "exec /bin/true", "state": "state"}
TARGETS = (("nacre-runc", "runc", "run", 1.0), ("in process", "crun", "run", 2.0))


@dataclass(frozen=True, slots=True)
class Took:
    wall_ms: float
    cpu_ms: float
    peak_kib: int


class Contender(Protocol):
    name: str
    version: str

    def act(self, act: str, name: str) -> Took: ...


@click.command("oci")
@click.option("--rounds", default=30, show_default=True, help="Rounds of every act of every runtime.")
@click.option("-o", "target", metavar="FILE", help="Write the figures as JSON.")
def oci(rounds: int, target: str | None) -> None:
    """nacre-runc beside runc and crun: run, create+start+delete, exec, state; wall and CPU time, peak memory."""
    require_root("run the benchmarks")
    _hide_hybrid()
    results = report.Results()
    with ExitStack() as stack:
        place = stack.enter_context(_workplace())
        contenders = [Command(place, "nacre-runc", *_ours()), Command(place, "runc", *_peer("runc"))]
        contenders += [Command(place, "crun", *_peer("crun"))]
        runtimes: list[Contender] = [*contenders, stack.enter_context(_forked(place))]
        results.versions = {one.name: one.version for one in runtimes}
        for one in runtimes:
            stack.enter_context(_standing(one, place))
        with output.step(f"{rounds} rounds of {len(ACTS)} acts of {len(runtimes)} runtimes"):
            _rounds(runtimes, rounds, results)
        with output.step("peak memory"):
            _memory(runtimes, contenders, results)
    report.show_oci(
        results, [one.name for one in runtimes], [(a, b, f"{ACTS[act]}, wall ms", goal) for a, b, act, goal in TARGETS]
    )
    if target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(report.document(results), file, indent=1)


def _hide_hybrid() -> None:
    """Debian's crun refuses hosts with both cgroup versions: this process and what it starts see no v2 beside v1."""
    layout = cgroups.discover()
    if layout.mode == "hybrid" and layout.unified is not None:
        namespaces.unshare(namespaces.Clone.NEWNS)
        mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE)
        mounts.umount2(layout.unified.mount, mounts.UnmountFlag.DETACH)


def _rounds(runtimes: Sequence[Contender], rounds: int, results: report.Results) -> None:
    process.set_child_subreaper()
    for number in range(-1, rounds):  # the first is not counted
        for act, words in ACTS.items():
            for one in runtimes if number % 2 == 0 else runtimes[::-1]:
                took = one.act(act, "standing" if act in ("exec", "state") else f"round-{number + 1}")
                if number >= 0:
                    results.add(f"{words}, wall ms", one.name, took.wall_ms)
                    results.add(f"{words}, CPU ms", one.name, took.cpu_ms)


def _memory(runtimes: Sequence[Contender], commands: Sequence[Command], results: report.Results) -> None:
    for one in runtimes:
        if one not in commands:
            results.put(f"{ACTS['run']}, peak MiB", one.name, one.act("run", "peak").peak_kib / 1024)
    for each in commands:
        results.put(f"{ACTS['run']}, peak MiB", each.name, each.peak_kib("peak") / 1024)


@contextmanager
def _workplace() -> Iterator[str]:
    """The bundles: one of /bin/true, one of a sleep; their root filesystem is a static busybox."""
    place = tempfile.mkdtemp(prefix="nacre-bench-oci-")
    rootfs = f"{place}/rootfs"
    try:
        for name in ("bin", "dev", "proc", "sys"):
            os.makedirs(f"{rootfs}/{name}")
        shutil.copy(engine.find_busybox(), f"{rootfs}/bin/busybox")
        for name in ("true", "sleep"):
            os.symlink("busybox", f"{rootfs}/bin/{name}")
        yield place
    finally:
        group = cgroups.Cgroup(cgroups.discover(), CGROUP)
        group.kill()
        group.remove()
        for hierarchy in cgroups.discover().hierarchies:  # runc makes groups in hierarchies without controllers too
            top = cgroups.discover().directory(hierarchy, CGROUP)
            for path, _, _ in os.walk(top, topdown=False) if os.path.isdir(top) else ():
                os.rmdir(path)
        shutil.rmtree(place)


def bundle(place: str, runtime: str, arguments: Sequence[str]) -> str:
    """A bundle of `arguments`, as `spec` writes it but for what would not be the same everywhere."""
    config: dict[str, Any] = templates.spec(rootless=False)
    config["ociVersion"] = "1.0.2"  # Debian's crun takes no newer document
    config["process"] |= {"args": list(arguments), "terminal": False, "rlimits": []}
    config["root"]["path"] = f"{place}/rootfs"
    directory = f"{place}/{runtime}-{os.path.basename(arguments[0])}"
    config["linux"]["cgroupsPath"] = f"{CGROUP}/{os.path.basename(directory)}"
    os.makedirs(directory, exist_ok=True)
    for name, document in (("config.json", config), ("process.json", config["process"] | {"args": ["/bin/true"]})):
        with open(f"{directory}/{name}", "w", encoding="utf-8") as file:
            json.dump(document, file)
    return directory


def _ours() -> tuple[str, dict[str, str]]:
    found = os.path.join(os.path.dirname(sys.executable), "nacre-runc")
    if not os.access(found, os.X_OK):
        raise NotFound(what="find nacre-runc", cause=f"there is no {found}", remedy="install nacre with pip, pipx or ./run setup")
    return found, {}


def _peer(name: str) -> tuple[str, dict[str, str]]:
    """The binary and its environment; a wrapper that the set-up made is looked through, since a shell would be measured too."""
    found = shutil.which(name)
    if found is None:
        raise NotFound(what=f"compare with {name}", cause=f"no {name} in PATH", remedy="./run bench unpacks it")
    with open(found, "rb") as file:
        if file.read(2) != b"#!":
            return found, {}
        words = file.read().decode().splitlines()[1].split()
    variable, _, value = words[0].partition("=")
    return words[words.index("exec") + 1], {variable: value}


@dataclass(slots=True)
class Command:
    """An OCI runtime by its command line."""

    place: str
    name: str
    binary: str
    settings: dict[str, str]
    version: str = field(default="")
    _true: str = field(default="")
    _sleep: str = field(default="")

    def __post_init__(self) -> None:
        said = subprocess.run(
            [self.binary, "--version"], env=os.environ | self.settings, capture_output=True, text=True, check=True
        )
        self.version = said.stdout.splitlines()[0]
        self._true, self._sleep = (
            bundle(self.place, self.name, words) for words in (["/bin/true"], ["/bin/sleep", "2147483647"])
        )

    def act(self, act: str, name: str) -> Took:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for words in self._words(act, name):
            self._call(words)
        took = time.perf_counter() - began
        _reap()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Took(took * 1000, cpu * 1000, 0)

    def peak_kib(self, name: str) -> int:
        """By busybox's time(1): a child of this process would count our own pages as its peak."""
        report_to = f"{self.place}/peak"
        self._call(self._words("run", name)[0], prefix=_timing(report_to))
        with open(report_to, encoding="ascii") as file:
            return int(file.read()) // _time_unit(report_to)

    def _words(self, act: str, name: str) -> list[list[str]]:
        if act == "run":
            return [["run", "--bundle", self._true, name]]
        if act == "life":
            return [["create", "--bundle", self._true, name], ["start", name], ["delete", "--force", name]]
        if act == "stand":
            return [["run", "--detach", "--bundle", self._sleep, name]]
        return {"exec": [["exec", name, "/bin/true"]], "state": [["state", name]], "end": [["delete", "--force", name]]}[act]

    def _call(self, words: list[str], prefix: Sequence[str] = ()) -> None:
        command = [*prefix, self.binary, "--root", f"{self.place}/state-{self.name}", *words]
        with open(f"{self.place}/said", "w+", encoding="utf-8") as said:
            spawned = subprocess.Popen(
                command, env=os.environ | self.settings, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            if spawned.wait():
                said.seek(0)
                raise Failure(
                    what=" ".join(command), cause=f"exit code {spawned.returncode}", evidence=tuple(said.read().splitlines())
                )


def _timing(report_to: str) -> list[str]:
    return [engine.find_busybox(), "time", "-f", "%M", "-o", report_to]


def _time_unit(report_to: str) -> int:
    """What busybox's time(1) calls a KiB: older ones take ru_maxrss for pages. A process that knows its own peak tells."""
    words = [sys.executable, "-I", "-S", "-c", "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"]
    own = int(engine.command([*_timing(report_to), *words]))
    with open(report_to, encoding="ascii") as file:
        return round(int(file.read()) / own)


def _reap() -> None:
    """What was left to us, the nearest subreaper: containers' processes, for their CPU time."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


@dataclass(slots=True)
class Forked:
    """The same acts in processes forked from one that has the runtime loaded."""

    place: str
    zygote: subprocess.Popen[str]
    name: str = "in process"
    version: str = f"Python {sys.version.split()[0]}"

    def act(self, act: str, name: str) -> Took:
        assert self.zygote.stdin is not None and self.zygote.stdout is not None
        if act in ("stand", "end"):
            return Took(0, 0, 0)
        if act in ("exec", "state"):  # of the command's container: the files are the same
            root, made = f"{self.place}/state-nacre-runc", bundle(self.place, "nacre-runc", ["/bin/sleep", "2147483647"])
        else:
            root, made = f"{self.place}/state-forked", bundle(self.place, "forked", ["/bin/true"])
        self.zygote.stdin.write(f"{act} {root} {made} {name}\n")
        self.zygote.stdin.flush()
        answer = self.zygote.stdout.readline()
        if not answer or answer.startswith("!"):
            raise Failure(what=f"{act} in a forked process", cause=answer[2:].strip() or "the zygote ended")
        wall, cpu, peak = answer.split()
        return Took(float(wall), float(cpu), int(peak))


@contextmanager
def _forked(place: str) -> Iterator[Forked]:
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    statement = (
        f"import sys; sys.path.insert(0, {package!r}); import runpy; runpy.run_path({inprocess.__file__!r}, run_name='__main__')"
    )
    zygote = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", statement], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Forked(place, zygote)
    finally:
        assert zygote.stdin is not None and zygote.stdout is not None
        zygote.stdin.close()
        zygote.wait(timeout=30)
        zygote.stdout.close()


@contextmanager
def _standing(one: Contender, place: str) -> Iterator[None]:
    """A container to execute in and to ask for."""
    one.act("stand", "standing")
    try:
        yield
    finally:
        one.act("end", "standing")
