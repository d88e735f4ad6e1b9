"""One running machine: QEMU's process, its control socket, the agent, the last words of both. Blocking; lives in one thread.

`Vm.boot` and `Vm.clone` start one; whoever does owns it and calls `close`, which ends it. When it ends by itself `on_death` is told
why, once, with the evidence; calls under way raise the same failure.

Every limit here is multiplied by `patience` (config.toml's): what it is on a usual host, times how much slower this one is.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nacre.agent import protocol
from nacre.kata import blank_image, machine, process
from nacre.kata.channel import Agent, AgentGone, AgentSilent
from nacre.kata.machine import Boot, Shape, Wires
from nacre.kata.qmp import Qmp, QmpBroken
from nacre.kata.waiting import Lines, Watcher, Watches
from nacre.linux.libc import owned
from nacre.oci.errors import Failure, NotFound

BOOT_S = 90.0  # a cold boot takes 3 to 8 s under emulation, on a busy machine several times that
CLONE_S = 30.0
WARM_S = 60.0
IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}  # RAM that lies in a shared file is not part of the stream
CODE_SHARE = 0.75
_PANIC = "Kernel panic"
_REHEARSED_LINK = protocol.Network(  # of documentation's addresses (RFC 5737), gone again before anybody is given a VM
    mac=machine.TEMPLATE_MAC, addresses=["192.0.2.2/24"], gateway="192.0.2.1", dns=["nameserver 192.0.2.1"]
)


class VMCrashed(Failure):
    """QEMU ended, or was killed, while its pod lived."""


class GuestPanic(Failure):
    """The guest's kernel gave up."""


class GuestGone(Failure):
    """The guest switched itself off."""


class CpuRefused(Failure):
    """A processor cannot be plugged into this machine any more."""


@dataclass(slots=True)
class Place:
    """Where a machine's process belongs: its cgroup's gates (see Cgroup.gates) and a file for the guest's console."""

    gates: Sequence[tuple[str, int]] = ()
    console_file: str = ""


@dataclass(slots=True)
class _Slot:
    fdset: int
    node: str


def _opened(path: str) -> int:
    """QEMU's user may not walk to the guest's files: it is given them open."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        cause = f"open {path}: {error.strerror}"
        raise NotFound(what="boot the guest", cause=cause, remedy="nacre enable kata") from error


def check_room(jit: str) -> None:
    """QEMU (7.2) aborts when a processor is plugged in whose translated code finds no room; `jit` is its `info jit`."""
    found = re.search(r"gen code size\s+(\d+)/(\d+)", jit)
    if found and int(found[1]) > int(found[2]) * CODE_SHARE:
        raise CpuRefused(
            what="plug a processor in",
            cause=f"{int(found[1]) >> 20} of {int(found[2]) >> 20} MiB of the emulator's translated code are taken; QEMU would abort",
            remedy="give the pod its CPU limit when it is made: a new machine has room",
        )


class Vm:
    """See the module. `on_event` gets the agent's events (protocol.Exit, Log, Lost)."""

    def __init__(self, loop: Watcher, shape: Shape, on_event: Callable[[Any], None], patience: int = 1) -> None:
        self.shape, self.patience = shape, patience
        self.watches = Watches(loop)
        self.line: list[str] = []
        self.pid = 0
        self.on_death: Callable[[Failure], None] = lambda _failure: None
        self._on_event = on_event
        self.migration = ""  # QEMU's word for how a save goes
        self._off = False
        self._slots: dict[int, _Slot] = {}
        self._fdsets = 0
        self._running: process.Running | None = None
        self._dead: Failure | None = None

    # starting

    def boot(self, boot: Boot, ram: int, place: Place, *, shared: bool, patience_s: float = BOOT_S) -> protocol.Greeting:
        """Boot the guest cold in the RAM file `ram` (the caller's); returns when its agent has answered."""
        what = "boot the guest"
        with owned(_opened(boot.kernel)) as kernel, owned(_opened(boot.initrd)) as initrd:
            inherited = Boot(kernel=f"/proc/self/fd/{kernel}", initrd=f"/proc/self/fd/{initrd}", cmdline=boot.cmdline)
            self._start(
                lambda wires: machine.cold_line(self.shape, wires, inherited, shared=shared), ram, place, (kernel, initrd)
            )
        with self._explained(what):
            self.qmp.execute("qmp_capabilities")
            return self._greet(what, patience_s)

    def clone(self, ram: int, state: int, place: Place) -> protocol.Greeting:
        """A copy of a template: RAM file `ram`, device state read from `state` (both the caller's)."""
        self._start(lambda wires: machine.clone_line(self.shape, wires), ram, place, (state,))
        what = "clone the template"
        with self._explained(what):
            asked = [
                self.qmp.send("qmp_capabilities", {}),
                self.qmp.send("migrate-set-capabilities", {"capabilities": [IGNORE_SHARED]}),
                self.qmp.send("migrate-incoming", {"uri": f"fd:{state}"}),
            ]
            for one in asked:
                self.qmp.answer(one)
            return self._greet(what, CLONE_S)

    def _start(self, line: Callable[[Wires], list[str]], ram: int, place: Place, extra: Sequence[int] = ()) -> None:
        self.line = line(Wires.sample())
        running = process.start(line, ram, place.gates, extra)
        self._running, self.pid = running, running.pid
        self.console = Lines(running.console.detach(), self.watches, place.console_file)
        self.errors = Lines(running.errors, self.watches)
        self.qmp = Qmp(running.qmp, self._qmp_event, self.patience)
        self.watches.watch(self.qmp.fileno(), self._qmp_readable)
        self.agent = Agent(running.agent, self.watches, self._on_event)

    def _greet(self, what: str, patience_s: float) -> protocol.Greeting:
        try:
            return self.agent.begin(patience_s * self.patience)
        except AgentSilent as silent:
            silent.what, silent.evidence = what, self.evidence()
            raise

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """A socket that closed means a machine that ended: say why it did."""
        try:
            yield
        except (AgentGone, QmpBroken) as gone:
            raise self.death(what) from gone

    # living

    @property
    def dead(self) -> bool:
        return self._dead is not None

    def call(self, parameters: Any, timeout_s: float = 30.0) -> Any:
        """A method of the agent (see channel.Agent.call); a machine that ended meanwhile is the failure then."""
        return self.answer(self.ask(parameters), timeout_s)

    def ask(self, parameters: Any) -> tuple[int, str, type | None]:
        """Send a request; `answer` of what this returns must follow."""
        with self._explained(f"{type(parameters).__name__.lower()} in the guest"):
            return self.agent.ask(parameters)

    def answer(self, asked: tuple[int, str, type | None], timeout_s: float) -> Any:
        """Of what `ask` returned."""
        try:
            with self._explained(f"{asked[1]} in the guest"):
                return self.agent.answer(asked, timeout_s * self.patience)
        except AgentSilent as silent:
            silent.evidence = self.evidence()
            raise

    def rehearse(self) -> None:
        """What every pod will ask, with nothing of a pod in it: the guest loads the code for it, and QEMU translates it."""
        files = protocol.Files(name="rehearsal", files=[protocol.File(path="file", content=b"\n")])
        self.call(
            protocol.Identify(entropy=os.urandom(64), now_ns=time.time_ns(), hostname="nacre", machine_id=os.urandom(16).hex())
        )
        self.call(protocol.Sandbox(hostname="nacre"))
        self.call(_REHEARSED_LINK)
        self.call(files)
        with owned(blank_image.opened()) as image:
            self.insert(0, image)
        self.call(protocol.Warm(drive=machine.slot_name(0), uuid=blank_image.UUID), WARM_S)
        self.eject(0)
        self.call(protocol.RemoveVolume(name=files.name))
        self.call(protocol.Network())

    def grow(self, hot_bytes: int) -> None:
        """Offer the guest so much memory beyond what it booted with; it takes it in its own time (protocol.Machine waits)."""
        self.qmp.execute("qom-set", {"path": "/machine/peripheral/memory", "property": "requested-size", "value": hot_bytes})

    def add_cpus(self, count: int) -> None:
        """Plug CPUs until there are `count`. Raises CpuRefused in an emulated machine that has run for long."""
        slots = self.qmp.execute("query-hotpluggable-cpus")
        free = sorted((one for one in slots if "qom-path" not in one), key=lambda one: int(one["props"]["socket-id"]))
        missing = free[: max(0, count - (len(slots) - len(free)))]
        if missing and self.shape.accelerator == "tcg":
            check_room(str(self.qmp.execute("x-query-jit")["human-readable-text"]))
        for one in missing:
            props = one["props"]
            self.qmp.execute("device_add", {"driver": one["type"], "id": f"cpu{props['socket-id']}"} | props)

    def insert(self, slot: int, fd: int) -> None:
        """Put the file open read-only as `fd` (the caller's) behind a drive slot."""
        self._fdsets += 1
        node = f"image{self._fdsets}"
        name = f"/dev/fdset/{self._fdsets}"
        self.qmp.execute("add-fd", {"fdset-id": self._fdsets}, (fd,))
        self.qmp.execute(
            "blockdev-add",
            {"driver": "file", "node-name": node, "filename": name, "read-only": True, "locking": "off", "aio": "threads"},
        )
        self._point(slot, node)
        self._slots[slot] = _Slot(self._fdsets, node)

    def eject(self, slot: int) -> None:
        """The slot is empty again; the guest must have let go of it. An empty one stays so, and with the machine all are."""
        held = self._slots.pop(slot, None)
        if held is not None and not self.dead:
            self._point(slot, machine.empty_node(slot))
            self.qmp.execute("blockdev-del", {"node-name": held.node})
            self.qmp.execute("remove-fd", {"fdset-id": held.fdset})

    def _point(self, slot: int, node: str) -> None:
        path = f"/machine/peripheral/{machine.slot_name(slot)}"
        self.qmp.execute("qom-set", {"path": path, "property": "drive", "value": node})

    # ending

    def exited(self, status: int) -> None:
        """QEMU was reaped with this wait status."""
        self.pid = 0
        if self._dead is None and self._running is not None:
            self._lost(self._verdict("run the pod's virtual machine", status))

    def death(self, what: str) -> Failure:
        """Why the machine is no more, as far as it can be told while QEMU may still be ending."""
        if self._dead is None:
            self._lost(self._verdict(what, self._peek()))
        assert self._dead is not None
        return self._dead

    def evidence(self) -> tuple[str, ...]:
        """The last lines of QEMU and of the guest's console."""
        if self._running is None:
            return ()
        self.console.drain()
        self.errors.drain()
        said = tuple(f"qemu: {line}" for line in self.errors.tail(5))
        return (*self.console.tail(15), *said)

    def close(self) -> None:
        """End it at once; the pid is reaped by who reaps this process's children, unless it is `kill`ed. Idempotent."""
        running, self._running = self._running, None
        if running is None:
            return
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self.watches.unwatch(self.qmp.fileno())
        self.agent.close()
        self.qmp.close()
        self.console.close()
        self.errors.close()

    def end(self) -> None:
        """`close`, and wait for the process: for those without a loop that reaps."""
        pid = self.pid
        self.close()
        if pid:
            os.waitpid(pid, 0)
            self.pid = 0

    def _lost(self, failure: Failure) -> None:
        self._dead = failure
        self.on_death(failure)

    def _peek(self) -> int | None:
        """QEMU's wait status if it ends within a second, not reaped."""
        deadline = time.monotonic() + 1.0
        while self.pid and time.monotonic() < deadline:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                return found.si_status if found.si_code != os.CLD_EXITED else found.si_status << 8
            self.watches.wait(lambda: False, 0.02)
        return None

    def _verdict(self, what: str, status: int | None) -> Failure:
        evidence = self.evidence()
        panic = self.console.since(_PANIC)
        if panic:
            return GuestPanic(
                what=what, cause=f"the guest's kernel gave up: {panic[0].split(_PANIC)[1].strip(' -:')}", evidence=panic
            )
        if self._off:
            return GuestGone(what=what, cause="the guest switched itself off", evidence=evidence)
        how = "QEMU has ended"
        if status is not None:
            how = f"QEMU was killed by signal {status & 127}" if status & 127 else f"QEMU ended with code {status >> 8}"
        return VMCrashed(what=what, cause=how, evidence=evidence)

    def _qmp_readable(self) -> None:
        self.qmp.readable()
        if self.qmp.closed:
            self.watches.unwatch(self.qmp.fileno())

    def _qmp_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "MIGRATION":
            self.migration = str(data.get("status"))
        elif name == "SHUTDOWN":
            self._off = data.get("reason") == "guest-shutdown"
