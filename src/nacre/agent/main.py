"""PID 1 of a pod's VM: boots the guest, then serves the host over one channel. Run by `__main__`.

Whatever ends this process ends the guest: the kernel panics and, told so by `panic=-1`, restarts at once, which QEMU takes for the end.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import nacre
from nacre.agent import boot, containers, drives, machine, volumes, warm
from nacre.agent import protocol as p
from nacre.agent.frames import Channel, Message
from nacre.agent.loop import Loop
from nacre.agent.relay import Relay
from nacre.linux import boot as power
from nacre.linux import process
from nacre.oci import state
from nacre.oci.errors import Failure, Invalid, encode, from_exception

READ = 256 << 10
_LOOK_AGAIN_S = 0.02
_OUTGOING_LIMIT = 32 << 20  # a host that asks and never reads


class Later:
    """An answer that is not there yet; `ready` is called from then on whenever something was plugged in."""

    def __init__(self, ready: Callable[[], Any | None], deadline: float, overdue: Callable[[], Failure]) -> None:
        self.ready, self.deadline, self.overdue = ready, deadline, overdue


class Agent:
    """The guest's one object: loop, channel, containers."""

    def __init__(self, port: int, uevents: boot.Uevents) -> None:
        self._port, self._uevents = port, uevents
        self._greeted = False  # until then the guest says nothing
        self._waiting: list[tuple[int, Later]] = []
        self._looking = False
        self._serving = 0  # the request being served
        self._filling = False  # whether containers are made ahead here
        self._warming: int | None = None  # the request that waits for the throw-away container
        self.loop = Loop(self._child_ended)
        self.channel = Channel()
        self.relay = Relay(self.loop, self.channel, self.flush)
        self.containers = containers.Containers(self.relay, self.say)
        self.plugged = machine.Plugged()
        self.loop.watch(port, self._port_changed, edge=True)
        self.loop.watch(uevents.fileno(), self._plugged_in)
        self._acts: dict[str, Callable[[Any], Any]] = {
            "hello": self._hello,
            "identify": machine.identify,
            "network": machine.configure_network,
            "machine": self._machine,
            "sandbox": self._sandbox,
            "volume": volumes.make,
            "files": volumes.write,
            "read_file": volumes.read,
            "remove_volume": lambda wanted: volumes.remove(wanted.name),
            "create": self.containers.create,
            "start": self.containers.start,
            "kill": self.containers.kill,
            "execute": self.containers.execute,
            "kill_exec": self.containers.kill_exec,
            "resize": self.containers.resize,
            "update": self.containers.update,
            "stats": self.containers.stats,
            "delete": self.containers.delete,
            "warm": self._warm,
            "shutdown": self._shutdown,
        }

    # the channel

    def _port_changed(self) -> None:
        """Edge-triggered: a port without a host is always "hung up", so a level would never let the loop rest."""
        self.flush()
        while True:
            try:
                data = os.read(self._port, READ)
            except BlockingIOError:
                return
            if not data:
                return  # the host has not opened its end, or closed it
            for event in self.channel.receive(data):
                if isinstance(event, Message):
                    self._request(event.document)
                else:
                    self.relay.handle(event)
            self.flush()

    def flush(self) -> None:
        """Write what fits; the rest goes when the port says so."""
        while self.channel.outgoing:
            try:
                count = os.write(self._port, self.channel.outgoing)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                break
            self.channel.written(count)
        if len(self.channel.outgoing) > _OUTGOING_LIMIT:
            raise Failure(what="answer the host", cause=f"it has not read {len(self.channel.outgoing)} bytes")

    def say(self, event: Any) -> None:
        """Send an event."""
        if isinstance(event, p.Exit) and event.container == warm.NAME:
            if event.exec_id and not event.code:
                self.containers.start(p.Start(container=warm.NAME))
            else:
                self._warmed(event)
            return
        if isinstance(event, p.Log):
            print(f"nacre-agent: {event.text}", flush=True)
        if self._greeted:
            name = next(name for name, kind in p.EVENTS.items() if isinstance(event, kind))
            self.channel.message({"event": name, "params": p.encode(event)})
            self.flush()

    def _request(self, document: dict[str, Any]) -> None:
        number = document.get("id")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= 1 << 53:
            raise Invalid(what="read a request", cause="its id is no number from 1 to 2**53")
        method = document.get("method")
        try:
            if method not in self._acts or not document.keys() <= {"id", "method", "params"}:
                raise Invalid(
                    what="read a request", cause=f"the agent has no method {str(method)[:64]!r}, or it has other fields"
                )
            params: Any = p.decode(p.METHODS[method][0], document.get("params", {}), method)
            if not self._greeted and method != "hello":
                raise Invalid(what=f"serve {method}", cause="the session begins with hello")
            self._serving = number
            result = self._acts[method](params)
        except Exception as error:  # whatever it was, it is the caller's, and the guest lives on
            self._fail(number, from_exception(f"{method} in the guest", error))
            return
        if isinstance(result, Later):
            self._waiting.append((number, result))
            self._plugged_in()
        elif method != "warm":
            self._answer(number, result)

    def _answer(self, number: int, result: Any) -> None:
        self.channel.message({"id": number, "result": {} if result is None else p.encode(result)})

    def _fail(self, number: int, failure: Failure) -> None:
        self.channel.message({"id": number, "failure": encode(failure)})

    # methods of the agent itself

    def _hello(self, wanted: p.Hello) -> p.Greeting:
        if wanted.version != p.VERSION:
            raise Invalid(what="greet the host", cause=f"it speaks version {wanted.version}, this guest {p.VERSION}")
        self.relay.reset()
        self.channel.reset()
        self._waiting.clear()
        self._greeted = True
        return machine.greet(wanted, p.VERSION, nacre.__version__)

    def _sandbox(self, wanted: p.Sandbox) -> None:
        machine.settle(wanted)
        if wanted.shared_pid:
            containers.share_pids(self.containers)

    def _machine(self, wanted: p.Machine) -> Later:
        def ready() -> p.Size | None:
            return self.plugged.size() if self.plugged.bring_online(wanted) else None

        def overdue() -> Failure:
            size = self.plugged.size()
            return Failure(
                what=f"bring {wanted.memory_bytes} bytes and {wanted.cpus} processors online",
                cause=f"after {wait_s} s there are {size.hot_memory_bytes} bytes and {size.cpus} processors",
            )

        wait_s = max(0, min(wanted.wait_s, 120))
        return Later(ready, time.monotonic() + wait_s, overdue)

    def _plugged_in(self) -> None:
        """Something was plugged in, or a deadline has passed."""
        self._uevents.drain()
        for number, later in list(self._waiting):
            try:
                result = later.ready()
            except OSError as error:
                self._waiting.remove((number, later))
                self._fail(number, from_exception("bring memory and processors online", error))
                continue
            if result is None and time.monotonic() < later.deadline:
                continue
            self._waiting.remove((number, later))
            if result is None:
                self._fail(number, later.overdue())
            else:
                self._answer(number, result)
        if self._waiting and not self._looking:  # memory that virtio-mem adds to a block that is on is announced to nobody
            self._looking = True
            self.loop.at(time.monotonic() + _LOOK_AGAIN_S, self._look_again)
        self.flush()

    def _look_again(self) -> None:
        self._looking = False
        self._plugged_in()

    def _warm(self, wanted: p.Warm) -> None:
        self._warming = self._serving
        drives.known()
        self._filling = not self.containers.spares  # else this is a clone of a template that has them
        if self._filling:
            self.containers.spares.fill()
        request = warm.request(p.Root(drive=wanted.drive, uuid=wanted.uuid))
        self.containers.create(request)
        self.containers.execute(p.Execute(container=warm.NAME, exec_id=warm.NAME, process=request.config["process"]))

    def _warmed(self, event: p.Exit) -> None:
        """The throw-away container has ended: sweep it, and answer."""
        number, self._warming = self._warming, None
        self.containers.delete(p.Delete(container=warm.NAME))
        if self._filling:
            self.containers.spares.fill()
        gc.collect()
        gc.freeze()
        process.own_memory()
        if number is None:
            return
        if event.code:
            self._fail(number, Failure(what="warm the guest", cause=f"the throw-away container ended with code {event.code}"))
        else:
            self._answer(number, None)
        self.flush()

    def _shutdown(self, _wanted: p.Shutdown) -> None:
        self.loop.at(time.monotonic(), power.power_off)

    def _child_ended(self, pid: int, status: int) -> None:
        self.containers.ended(pid, status)


def main() -> None:
    """Never returns."""
    in_python_ms = time.monotonic_ns() // 1_000_000
    boot.prepare()
    prepared_ms = time.monotonic_ns() // 1_000_000
    uevents = boot.Uevents()
    port = boot.open_port(uevents)
    state.keep_in_memory()  # PID 1 alone acts on the guest's containers, and no record outlives it
    agent = Agent(port, uevents)
    gc.collect()
    gc.freeze()
    ready_ms = time.monotonic_ns() // 1_000_000
    print(f"nacre-agent: Python after {in_python_ms} ms, mounts and modules {prepared_ms}, ready {ready_ms}", flush=True)
    agent.loop.run()


def run() -> None:
    """`main`, and the end of the machine when that ends."""
    try:
        main()
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        power.restart()
