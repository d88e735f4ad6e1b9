"""A guest booted cold, without pool or template, and a small driver for its agent: what the host's half does, in a hundred lines."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacre import config
from nacre.agent import frames, protocol
from nacre.kata.appliance import Appliance, build
from nacre.oci.errors import decode

CACHE = Path(__file__).resolve().parents[2] / ".cache"
TB_MIB = 256  # QEMU 7.2 aborts when a CPU is plugged in after the others have filled the translation buffer
BOOT_S, CALL_S = 180.0, 120.0  # bounds for a machine that does much else at the same time


@dataclass
class Guest:
    """The VM's process, the channel's socket, and what came over it."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    monitor: socket.socket
    console: Path
    channel: frames.Channel = field(default_factory=frames.Channel)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    output: dict[int, bytearray] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    held_back: set[int] = field(default_factory=set)  # streams that get no credit
    number: int = 0

    def __post_init__(self) -> None:
        self._lines = self.monitor.makefile("r")

    def call(self, method: str, *, timeout_s: float = CALL_S, **params: Any) -> Any:
        """The method's result as its dataclass. Raises the Failure that the guest answered."""
        return self.answer(self.ask(method, **params), method, timeout_s)

    def ask(self, method: str, **params: Any) -> int:
        self.number += 1
        document = protocol.encode(protocol.METHODS[method][0](**params))
        self.channel.message({"id": self.number, "method": method, "params": document})
        return self.number

    def answer(self, number: int, method: str, wait_s: float = CALL_S) -> Any:
        self.until(lambda: number in self.answers, f"{method} to be answered", wait_s)
        answer = self.answers.pop(number)
        if "failure" in answer:
            raise decode(answer["failure"])
        kind = protocol.METHODS[method][1]
        return answer["result"] if kind is None else protocol.decode(kind, answer["result"])

    def until(self, done: Any, what: str, wait_s: float = CALL_S) -> None:
        deadline = time.monotonic() + wait_s
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, f"waited {wait_s} s for {what}; console:\n{self.said()}"
            self.step(left)

    def step(self, wait_s: float) -> None:
        writing = [self.sock] if self.channel.outgoing else []
        readable, writable, _ = select.select([self.sock], writing, [], wait_s)
        if writable:
            self.channel.written(self.sock.send(self.channel.outgoing))
        if readable:
            data = self.sock.recv(1 << 20)
            assert data, f"the guest is gone; console:\n{self.said()}"
            for event in self.channel.receive(data):
                self.take(event)

    def take(self, event: frames.Event) -> None:
        match event:
            case frames.Message(document) if "event" in document:
                self.events.append(protocol.decode(protocol.EVENTS[document["event"]], document["params"]))
            case frames.Message(document):
                self.answers[document["id"]] = document
            case frames.Data(stream, data):
                self.output.setdefault(stream, bytearray()).extend(data)
                if stream not in self.held_back:
                    self.channel.consumed(stream, len(data))
            case frames.Ended(stream):
                self.ended.add(stream)
            case frames.Stopped(stream):
                self.stopped.add(stream)

    def open(self, *, sends: bool = False, receives: bool = False) -> int:
        stream = self.channel.next_stream()
        self.channel.open(stream, sends=sends, receives=receives)
        return stream

    def exit_of(self, container: str, exec_id: str = "") -> protocol.Exit:
        def found() -> list[protocol.Exit]:
            return [
                one
                for one in self.events
                if isinstance(one, protocol.Exit) and (one.container, one.exec_id) == (container, exec_id)
            ]

        self.until(found, f"{container} {exec_id} to end")
        return found()[0]

    def read(self, stream: int) -> str:
        """All of an output stream, once it has ended."""
        self.until(lambda: stream in self.ended, f"the end of stream {stream}")
        return bytes(self.output.get(stream, b"")).decode()

    def plug(self, command: str, **arguments: Any) -> None:
        """One QMP command."""
        self.monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        answer = json.loads(self._lines.readline())
        while "event" in answer or "QMP" in answer:
            answer = json.loads(self._lines.readline())
        assert "return" in answer, answer

    def said(self) -> str:
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-60:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self.monitor.close()
        self.sock.close()


def appliance_for_tests() -> Appliance:
    """Built once, kept in .cache: a second run needs no network."""
    return build(config.Config(prefix=str(CACHE / "guest")), progress=print)


def boot(
    appliance: Appliance,
    workdir: Path,
    *,
    memory_mib: int = 128,
    drives: dict[str, Path] | None = None,
    extra: tuple[str, ...] = (),
) -> Guest:
    """QEMU under TCG; `drives` are serial to file, read-only. Answers before the guest has booted."""
    ours, theirs = socket.socketpair()
    monitor, their_monitor = socket.socketpair()
    console = workdir / "console.log"
    before, _, after = appliance.cmdline.partition(" -- ")
    command = [
        "qemu-system-x86_64", "-machine", "q35,acpi=on", "-accel", f"tcg,thread=multi,tb-size={TB_MIB}", "-cpu", "max",
        "-smp", "cpus=1,maxcpus=2,sockets=2", "-m", f"{memory_mib}M,slots=1,maxmem={memory_mib + 512}M",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", f"file:{console}", "-kernel", appliance.kernel, "-initrd", appliance.initrd,
        "-append", f"console=ttyS0 {before} -- {after}",
        "-object", "memory-backend-ram,id=more,size=512M,reserve=off",
        "-device", "virtio-mem-pci,id=memory,memdev=more,requested-size=0,block-size=2M",
        "-chardev", f"socket,id=qmp,fd={their_monitor.fileno()}", "-mon", "chardev=qmp,mode=control",
        "-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={theirs.fileno()}",
        "-device", f"virtserialport,chardev=agent,name={protocol.PORT}",
    ]  # fmt: skip
    for serial, path in (drives or {}).items():
        command += ["-drive", f"id={serial},file={path},format=raw,if=none,readonly=on"]
        command += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
    with (workdir / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, *extra],  # a killed test takes its machine along
            pass_fds=[theirs.fileno(), their_monitor.fileno()],
            stderr=log,
        )
    theirs.close()
    their_monitor.close()
    guest = Guest(process=process, sock=ours, monitor=monitor, console=console)
    guest.plug("qmp_capabilities")
    return guest


def hello(guest: Guest) -> protocol.Greeting:
    nonce = os.urandom(8).hex()
    greeting: protocol.Greeting = guest.call("hello", version=protocol.VERSION, nonce=nonce, timeout_s=BOOT_S)
    assert greeting.nonce == nonce
    return greeting
