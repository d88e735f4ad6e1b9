"""The pod as a virtual machine: the shim's joint (`oci.handler.Handler`) over one `Vm`. Made by a shim as `KataHandler(host)`.

The pod's network namespace is pinned on the host as for any pod; QEMU's tap is moved into it and takes its link's frames. Containers,
their mounts and limits are the guest's, by the same runtime code. Every process of the VM is in CGROUP/SANDBOX_ID.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from nacre.agent import protocol
from nacre.kata import documents, link, plan, sizing, template
from nacre.kata.drives import Drives
from nacre.kata.vm import Place, Vm
from nacre.kata.volumes import Volumes
from nacre.linux.cgroups import Cgroup, discover
from nacre.linux.libc import owned
from nacre.oci import trace
from nacre.oci.errors import Failure, NotFound, encode
from nacre.oci.handler import Exit, Host, Rootfs, Sandbox, Stdio

TEMPLATE = "kata-template"  # the zygote's name for the sealed template
CREATE_S = 60.0
GROW_S = 20
FLUSH_S = 5.0
EARLY_S = 30.0


@dataclass(slots=True)
class _Container:
    """One container, as this side holds it."""

    memory_limit: int
    ended: bool = False
    execs: set[str] = field(default_factory=set)


class KataHandler:
    """Handler (see `oci.handler.Handler` for every call's meaning)."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sandbox: Sandbox | None = None
        self._vm: Vm | None = None
        self._group: Cgroup | None = None
        self._containers: dict[str, _Container] = {}
        self._exits: list[protocol.Exit] = []
        self._wake = -1  # an eventfd: exits are told outside of whatever call heard of them
        self._early: list[tuple[tuple[int, str, type | None], Any, int]] = []  # asked, its request, since when
        self._patience = 1
        self._hot_bytes = 0
        self._growing: tuple[int, str, type | None] | None = None
        self.start_kind = ""  # how the VM came to be: "clone", or "cold start because …"

    # the machine

    def warm(self, settings: dict[str, Any]) -> None:
        """Clone a VM for a pod to come, and rehearse in it."""
        self._group = Cgroup(discover(), f"{settings['cgroup_root']}/kata-pool/{os.getpid()}")
        try:
            self._start(settings, f"{settings['directory']}/console.log")
            self.vm.rehearse()
        except BaseException:
            self._end_vm()
            raise

    def create_sandbox(self, sandbox: Sandbox) -> dict[str, Any]:
        documents.check_sandbox(sandbox)
        self._sandbox = sandbox
        try:
            link.pin_network(f"{sandbox.directory}/ns")
            group = Cgroup(discover(), documents.group_path(sandbox))
            group.create()
            if sandbox.resources.get("cpu"):
                group.apply({"cpu": sandbox.resources["cpu"]})
            if self._vm is None:
                self._group = group
                self._start(sandbox.settings, f"{sandbox.directory}/console.log")
            else:
                self._move_to(group)
            self._volumes = Volumes(self._call, self._ahead, sandbox.directory, sandbox.pod_uid)
            self._drives = Drives(self.vm)
            self._furnish(sandbox)
        except BaseException:
            self.destroy_sandbox()
            raise
        return {"pid": self.vm.pid}

    @property
    def vm(self) -> Vm:
        if self._vm is None:
            raise Failure(what="use the pod's virtual machine", cause="it was not created, or has been ended")
        return self._vm

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            raise Failure(what="use the pod sandbox", cause="it was not created")
        return self._sandbox

    def _start(self, settings: dict[str, Any], console: str) -> None:
        """A clone of the template where there is one, else a cold boot; which and why is told."""
        assert self._group is not None
        self._patience = settings.get("patience", 1)
        self._group.create()
        gates = self._group.gates()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._host.watch(self._wake, self._tell_exits)
        sealed = self._host.inherited(TEMPLATE)
        try:
            place = Place(gates=gates, console_file=console)
            if sealed is not None and settings["kata"]["template"]:
                self._clone(sealed, place)
            else:
                reason = "no template is there yet" if settings["kata"]["template"] else "template = false"
                self._boot(settings["data"], place, reason)
        finally:
            for _directory, fd in gates:
                os.close(fd)

    def _clone(self, sealed: int, place: Place) -> None:
        found = template.read(sealed)
        self._vm = self._machine(found.plan)
        with owned(template.open_state(sealed, found)) as state:
            self._greeting = self.vm.clone(sealed, state, place)
        self.start_kind = "clone"
        self._mine()

    def _boot(self, data: str, place: Place, reason: str) -> None:
        self.start_kind = f"cold start because {reason}"
        print(self.start_kind, flush=True)  # the shim's log
        found = plan.load(data)
        self._vm = self._machine(found)
        with owned(os.memfd_create("nacre-guest", os.MFD_CLOEXEC)) as ram:
            os.ftruncate(ram, found.shape.ram_bytes)
            self._greeting = self.vm.boot(found.boot, ram, place, shared=True)
        self._mine()

    def _machine(self, found: plan.Plan) -> Vm:
        made = Vm(self._host, found.shape, self._event, self._patience)
        made.on_death = self._died
        return made

    def _mine(self) -> None:
        self._host.reap(self.vm.pid, self.vm.exited)

    def _move_to(self, group: Cgroup) -> None:
        """A pool member becomes this pod's: from now on what it touches is charged there."""
        former, self._group = self._group, group
        group.join(self.vm.pid)
        if former is not None:
            former.remove()

    def _furnish(self, sandbox: Sandbox) -> None:
        """What makes a clone this pod's machine."""
        self._record("vm", "QEMU", {"line": self.vm.line, "start": self.start_kind})
        self._grow(sizing.hot_bytes((), sizing.memory_limit(sandbox.resources), self.vm.shape))
        identity = protocol.Identify(
            entropy=os.urandom(64), now_ns=time.time_ns(), hostname=sandbox.hostname or "pod", machine_id=os.urandom(16).hex()
        )
        settings = protocol.Sandbox(
            hostname=sandbox.hostname,
            sysctls=dict(sandbox.sysctls),
            shm_bytes=sandbox.shm_bytes,
            shared_pid="pid" in sandbox.namespaces,
        )
        self._ahead(identity, settings)  # while the host makes the pod's link

    def _grow(self, hot_bytes: int) -> None:
        """Begin to give the guest so much memory, and the CPUs of the pod; `_grown` waits for it."""
        self._grown()
        cpus = sizing.cpus(self.sandbox.resources, self.vm.shape)
        if cpus == 1 and hot_bytes <= self._hot_bytes:
            return
        if hot_bytes > self._hot_bytes:
            self.vm.grow(hot_bytes)
            self._hot_bytes = hot_bytes
        if cpus > 1:
            self.vm.add_cpus(cpus)
        self._growing = self.vm.ask(protocol.Machine(memory_bytes=self._hot_bytes, cpus=cpus, wait_s=GROW_S * self._patience))

    def _grown(self) -> None:
        """The memory that was asked for is there. Raises the agent's Failure when the guest could not take it."""
        if self._growing is not None:
            asked, self._growing = self._growing, None
            self.vm.answer(asked, GROW_S + 10.0)

    def network_ready(self, attachment: dict[str, Any]) -> None:
        link.join(self.vm.pid, f"{self.sandbox.directory}/ns/net", str(attachment["interface"]))
        self._ahead(documents.network(attachment, self.sandbox.dns))  # while the host makes the first container's document

    # containers

    def create(self, container: str, bundle: str, rootfs: Rootfs, stdio: Stdio) -> int | None:
        what = f"create container {container[:12]}"
        ends = documents.Streams(self.vm.agent, stdio)
        try:
            config = documents.load(f"{bundle}/config.json", what)
            limit = sizing.memory_limit((config.get("linux") or {}).get("resources") or {})
            root = self._drives.insert(container, rootfs, what)
            config["mounts"] = self._volumes.translate(container, config)
            self._make_room(limit)
            self._call(protocol.Create(container=container, config=config, root=root, **ends.numbers), CREATE_S)
            ends.go()
        except BaseException:
            ends.give_up()
            self._drives.eject(container)
            raise
        self._containers[container] = _Container(memory_limit=limit)
        return ends.console

    def _make_room(self, *more: int) -> None:
        """Memory for the containers there are, and more with these limits, where the pod's own limit has not provided for it."""
        limits = [one.memory_limit for one in self._containers.values() if not one.ended] + list(more)
        wanted = sizing.hot_bytes(limits, sizing.memory_limit(self.sandbox.resources), self.vm.shape)
        if wanted > self._hot_bytes:
            self._grow(wanted)
        self._grown()

    def start(self, container: str) -> int:
        self._call(protocol.Start(container=container))
        return 0

    def kill(self, container: str, signal: int, *, everyone: bool = False) -> None:
        self._call(protocol.Kill(container=container, signal=signal, everyone=everyone))

    def execute(self, container: str, exec_id: str, process: dict[str, Any], stdio: Stdio) -> int | None:
        ends = documents.Streams(self.vm.agent, stdio)
        held = self._held(container)
        held.execs.add(exec_id)
        try:
            self._call(protocol.Execute(container=container, exec_id=exec_id, process=process, **ends.numbers))
            ends.go()
        except BaseException:
            held.execs.discard(exec_id)
            ends.give_up()
            raise
        return ends.console

    def kill_exec(self, container: str, exec_id: str, signal: int) -> None:
        self._call(protocol.KillExec(container=container, exec_id=exec_id, signal=signal))

    def resize(self, container: str, exec_id: str, width: int, height: int) -> None:
        self._call(protocol.Resize(container=container, exec_id=exec_id, width=width, height=height))

    def update(self, container: str, resources: dict[str, Any]) -> None:
        held = self._held(container)
        limit = sizing.memory_limit(resources)
        if limit:
            held.memory_limit = limit
            self._make_room()
        self._call(protocol.Update(container=container, resources=resources))
        self._volumes.refresh()  # our kubelet sets resources as they are when copied volumes have changed

    def stats(self, container: str) -> dict[str, Any]:
        """A container's by the guest's account; the pod's by the host's, where everything of its VM counts."""
        if container:
            answer: dict[str, Any] = self._call(protocol.Stats(container=container))
            return answer
        assert self._group is not None
        return self._group.stats()

    def delete(self, container: str) -> None:
        if self._vm is not None and not self._vm.dead:
            self._call(protocol.Delete(container=container), CREATE_S)
            self._drives.eject(container)
        self._containers.pop(container, None)

    def vm_flush(self) -> None:
        """Whatever the guest had said when its last process ended goes out, as far as somebody reads it within a moment."""
        agent = self.vm.agent
        self.vm.watches.wait(lambda: not agent.has_outlets or agent.broken is not None, FLUSH_S)

    def destroy_sandbox(self) -> None:
        self._end_vm()
        if self._sandbox is not None:
            link.unpin_network(f"{self._sandbox.directory}/ns")
            documents.remove_groups(self._sandbox)

    def _held(self, container: str) -> _Container:
        try:
            return self._containers[container]
        except KeyError:
            raise NotFound(what=f"find container {container[:12]}", cause="its virtual machine does not hold it") from None

    # what happens by itself

    def _call(self, parameters: Any, timeout_s: float = 30.0) -> Any:
        return self._calls(parameters, timeout_s=timeout_s)[0]

    def _ahead(self, *requests: Any) -> None:
        """Sent now, awaited by the next `_calls`, which raises what went wrong with them before it asks anything of its own."""
        self._early += [(self.vm.ask(one), one, time.monotonic_ns()) for one in requests]

    def _caught_up(self) -> None:
        while self._early:
            asked, request, began = self._early.pop(0)
            self.vm.answer(asked, EARLY_S)
            self._record("agent", type(request).__name__.lower(), documents.shown(request), time.monotonic_ns() - began)

    def _calls(self, *requests: Any, timeout_s: float = 30.0) -> list[Any]:
        """All are sent before the first answer is waited for; the guest takes them in order."""
        self._caught_up()
        began = time.monotonic_ns()
        asked = [self.vm.ask(one) for one in requests]
        answers = []
        for one, request in zip(asked, requests, strict=True):
            answers.append(self.vm.answer(one, timeout_s))
            if not isinstance(request, protocol.Stats):
                name = type(request).__name__.lower()
                self._record("agent", name, documents.shown(request), time.monotonic_ns() - began)
        return answers

    def _record(self, joint: str, what: str, document: Any, took_ns: int | None = None) -> None:
        if self._sandbox is not None and self._sandbox.pod_uid and self._sandbox.trace_dir:
            trace.record(self._sandbox.trace_dir, self._sandbox.pod_uid, joint, what, document, took_ns=took_ns)

    def _event(self, event: Any) -> None:
        """From the agent, in the midst of whatever call reads its channel: kept, and dealt with by the loop."""
        if isinstance(event, protocol.Exit):
            self._exits.append(event)
            os.eventfd_write(self._wake, 1)
        elif isinstance(event, protocol.Lost):
            self._host.sandbox_lost(event.failure)
        else:
            print(f"guest: {event.text[:500]}", flush=True)

    def _tell_exits(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        exits, self._exits = self._exits, []
        for end in exits:
            self._tell_exit(end)

    def _tell_exit(self, end: protocol.Exit) -> None:
        held = self._containers.get(end.container)
        if held is None or (end.exec_id and end.exec_id not in held.execs) or (not end.exec_id and held.ended):
            return
        self.vm.agent.flush_outlets()
        if end.exec_id:
            held.execs.discard(end.exec_id)
        else:
            held.ended = True
            self._read_back(end.container)
        code = end.code if 0 <= end.code <= 255 else 255
        self._host.exited(
            Exit(container=end.container, exec_id=end.exec_id, code=code, at_ns=time.time_ns(), oom_killed=end.oom_killed)
        )

    def _read_back(self, container: str) -> None:
        try:
            self._volumes.ended(container)
        except (Failure, OSError) as error:  # the exit itself must be told
            print(f"termination log of {container[:12]}: {error}", flush=True)

    def _died(self, failure: Failure) -> None:
        """The VM is gone, and everything that ran in it with the same reason."""
        document = encode(failure)
        self._record("failure", failure.what, document)
        print(failure.sentence(), *failure.evidence, sep="\n  ", flush=True)
        for container, held in self._containers.items():
            for exec_id in sorted(held.execs):
                self._host.exited(_lost_exit(container, exec_id, document))
            held.execs.clear()
            if not held.ended:
                held.ended = True
                self._host.exited(_lost_exit(container, "", document))
        self._host.sandbox_lost(document)

    def _end_vm(self) -> None:
        """QEMU away, its cgroup too, when nothing else is in it. Idempotent."""
        vm, self._vm = self._vm, None
        if vm is not None:
            vm.end()
        if self._wake >= 0:
            self._host.unwatch(self._wake)
            os.close(self._wake)
            self._wake = -1
        group, self._group = self._group, None
        if group is not None:
            group.remove()


def _lost_exit(container: str, exec_id: str, failure: dict[str, Any]) -> Exit:
    code = 128 + signal.SIGKILL
    return Exit(container=container, exec_id=exec_id, code=code, at_ns=time.time_ns(), failure=failure)
