"""Everything that VM pods need, made ready and measured: guest built, accelerator tried, template saved, one clone weighed.

`prepare` runs it in a process of its own (its caller may have threads, and VMs are forked), `python -m nacre.kata.enable PREFIX`, which
says one JSON object a line: {"progress"}, then {"prepared"} or {"failure"}. May be repeated; what is there already is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from nacre import config as configuration
from nacre.config import Config
from nacre.kata import accelerator, appliance, planning, template
from nacre.kata.machine import MIB
from nacre.kata.plan import Plan
from nacre.kata.sizing import INCLUDED_BYTES
from nacre.kata.vm import Place, Vm
from nacre.kata.waiting import Nobody
from nacre.linux.cgroups import Cgroup, discover
from nacre.linux.process import set_parent_death_signal
from nacre.oci.errors import Failure, NotFound, decode, encode, from_exception

Progress = Callable[[str], None]
IDLE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    findings: list[str]
    overhead: dict[str, str]  # what one VM costs beyond its containers, as Kubernetes quantities


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One VM that has run a container, at rest."""

    start_s: float  # until its agent answered
    own_bytes: int  # QEMU's own memory: all but the guest's RAM
    guest_bytes: int  # of the guest's RAM, what differs from the template's
    idle_milli_cpu: int


def prepare(config: Config, progress: Progress) -> Prepared:
    """Raises the first Failure of the guest's build, the accelerator, the template, the trial clone."""
    command = [sys.executable, "-P", "-m", "nacre.kata.enable", config.prefix, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "failure" in said:
                raise decode(said["failure"])
            if "prepared" in said:
                return Prepared(**said["prepared"])
            progress(said["progress"])
    raise Failure(what="prepare virtual machines", cause=f"the process that does it ended with code {process.returncode}")


def _prepare(config: Config, progress: Progress) -> Prepared:
    path, version = planning.qemu(config.kata.qemu)
    _needs_erofs()
    guest = appliance.build(config, progress)
    chosen = accelerator.probe(config)
    file = template.ensure(config, progress)
    found = planning.make(config, chosen.name)
    progress("weighing one virtual machine")
    weight = weigh(config, found, file)
    return Prepared(
        findings=[
            f"{version} at {path}",
            f"guest: Linux {guest.kernel_release}, Python {guest.python}",
            f"accelerator: {chosen.name}, {chosen.reason}",
            f"a virtual machine {'cloned' if file else 'booted (template = false)'} in {weight.start_s * 1000:.0f} ms;"
            f" idle it holds {(weight.own_bytes + weight.guest_bytes) / MIB:.0f} MiB and {weight.idle_milli_cpu} m of a CPU",
        ],
        overhead=overhead(found, weight),
    )


def _needs_erofs() -> None:
    if shutil.which("mkfs.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        raise NotFound(
            what="prepare virtual machines",
            cause="mkfs.erofs, which makes images into drives, is not installed",
            remedy="apt-get install --no-install-recommends erofs-utils",
        )


def overhead(found: Plan, weight: Weight) -> dict[str, str]:
    """QEMU's own memory as weighed and all of the guest's base RAM, which its kernel may come to use; and the CPU it takes at rest."""
    base = found.shape.ram_bytes - INCLUDED_BYTES
    memory = -(-(weight.own_bytes + base) // (8 * MIB)) * 8
    return {"memory": f"{memory}Mi", "cpu": f"{max(10, -(-weight.idle_milli_cpu // 10) * 10)}m"}


def weigh(config: Config, found: Plan, file: str | None) -> Weight:
    """Start a VM as pods get one, run the throw-away container in it, and look at it at rest."""
    with ExitStack() as undo:
        group = Cgroup(discover(), f"{config.cgroup_root}/kata-trial")
        group.create()
        undo.callback(group.remove)
        gates = group.gates()
        vm = Vm(Nobody(), found.shape, _nothing, config.patience)
        undo.callback(vm.end)
        try:
            start_s = _start(vm, found, file, Place(gates=gates))
        finally:
            for _directory, fd in gates:
                os.close(fd)
        vm.rehearse()
        before = group.stats()["cpu_ns"]
        vm.watches.wait(lambda: False, IDLE_S)
        idle = (group.stats()["cpu_ns"] - before) / (IDLE_S * 1e6)
        own, guest = _anonymous(vm.pid)
        return Weight(start_s=start_s, own_bytes=own, guest_bytes=guest, idle_milli_cpu=int(idle))


def _start(vm: Vm, found: Plan, file: str | None, place: Place) -> float:
    """Seconds that it took."""
    with ExitStack() as undo:
        if file is None:
            ram = os.memfd_create("nacre-guest", os.MFD_CLOEXEC)
            undo.callback(os.close, ram)
            os.ftruncate(ram, found.shape.ram_bytes)
            began = time.monotonic()
            vm.boot(found.boot, ram, place, shared=True)
            return time.monotonic() - began
        sealed = template.open_sealed(file)
        undo.callback(os.close, sealed)
        began = time.monotonic()
        state = template.open_state(sealed, template.read(sealed))
        undo.callback(os.close, state)
        vm.clone(sealed, state, place)
        return time.monotonic() - began


def _anonymous(pid: int) -> tuple[int, int]:
    """(elsewhere, in the guest's RAM) of a QEMU's private memory, by smaps."""
    own = guest = 0
    of_guest = False
    with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            word, _, rest = line.partition(" ")
            if "-" in word and not word.endswith(":"):
                of_guest = "memfd:nacre-" in rest
            elif word in ("Private_Dirty:", "Private_Clean:") and (of_guest or word == "Private_Dirty:"):
                size = int(rest.split()[0]) * 1024
                guest, own = (guest + size, own) if of_guest else (guest, own + size)
    return own, guest


def _nothing(_event: Any) -> None:
    """What a guest on trial has to say beyond its answers."""


def main() -> None:
    """PREFIX PARENT: see the module."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        os._exit(1)
    what = "prepare virtual machines"
    try:
        made = _prepare(configuration.load(sys.argv[1]), lambda text: print(json.dumps({"progress": text}), flush=True))
        print(json.dumps({"prepared": asdict(made)}), flush=True)
    except (Failure, OSError) as error:
        print(json.dumps({"failure": encode(from_exception(what, error))}), flush=True)


if __name__ == "__main__":
    main()
