"""The pod's containers: OCI documents of the host made this guest's own, then `nacre.runc` as it is.

/run/nacre/containers/ID/{config.json, rootfs, layer, lower}    the bundle; gone after `delete`
/run/nacre/runc/ID/                                            the runtime's record
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nacre import runc
from nacre.agent import boot, drives, machine
from nacre.agent import protocol as p
from nacre.agent.frames import Channel
from nacre.agent.relay import Relay, resize
from nacre.agent.spares import Spares
from nacre.linux import cgroups
from nacre.oci.errors import AlreadyExists, Failure, NotFound, Unsupported
from nacre.runc.spare import Spare

runc.load()  # here, once: children forked for a container must find every module in memory

BUNDLES = f"{boot.RUN}/containers"
RUNC = f"{boot.RUN}/runc"
POD = "/pod"  # cgroup of all containers
Say = Callable[[Any], None]  # an event of the protocol


class PodInitDied(Failure):
    """The init of the pod's shared PID namespace ended, and every process of the namespace with it."""


@dataclass(slots=True, kw_only=True)
class Held:
    """One process that was started for the host, until it is reaped."""

    container: str
    exec_id: str
    streams: tuple[int, ...] = ()  # of its output
    stdin: int = 0
    console: int = 0


@dataclass(slots=True)
class Containers:
    """Those there are. `say` sends an event."""

    relay: Relay
    say: Say
    pids: dict[int, Held] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)  # container to its drive
    pod_init: int = 0
    layout: cgroups.Layout | None = None
    spares: Spares = field(init=False)
    ahead: dict[str, Spare] = field(default_factory=dict)  # created by a spare and not started yet

    def __post_init__(self) -> None:
        self.spares = Spares(lambda name: cgroups.Cgroup(self._cgroups(), f"{POD}/{name}"))  # no container's name begins so

    # life

    def create(self, wanted: p.Create) -> p.Started:
        """See `protocol.Create`. Undone when it fails, its streams ended."""
        directory = f"{BUNDLES}/{wanted.container}"
        with ExitStack() as undo:
            stdio = Stdio(self.relay, wanted)
            undo.callback(stdio.abandon)
            config = adapt(wanted.config, wanted.container, self.pod_init)
            try:
                os.mkdir(directory, 0o711)
            except FileExistsError:
                raise AlreadyExists(what=f"create container {wanted.container}", cause="the guest has one of this name") from None
            undo.callback(shutil.rmtree, directory)
            if wanted.root.drive:
                drives.mount_root(directory, wanted.root)
                undo.callback(drives.unmount_root, directory, wanted.root.drive)
            else:
                drives.mount_own(directory)
                undo.callback(drives.unmount_root, directory, "")
            launch = self._bring_up(wanted.container, directory, config, stdio)
            undo.pop_all()
        self.roots[wanted.container] = wanted.root.drive
        self.pids[launch.pid] = stdio.attach(launch.console, Held(container=wanted.container, exec_id=""))
        self._tell(launch.warnings)
        return p.Started(pid=launch.pid)

    def _bring_up(self, container: str, directory: str, config: dict[str, Any], stdio: Stdio) -> runc.Launch:
        """By a spare where one fits, else from the beginning."""
        rest = self.spares.rest(config)
        if rest is None:
            with open(f"{directory}/config.json", "w", encoding="utf-8") as file:
                file.write(json.dumps(config))  # json.dump would encode in Python, not in C
            return runc.create(RUNC, container, directory, stdio=stdio.theirs, tty=stdio.tty, layout=self._cgroups())
        spare = self.spares.take()
        launch = spare.create(RUNC, container, directory, rest, stdio=stdio.theirs, tty=stdio.tty)
        self.ahead[container] = spare
        return launch

    def start(self, wanted: p.Start) -> p.Started:
        spare = self.ahead.pop(wanted.container, None)
        if spare is None:
            runc.start(RUNC, wanted.container)
        else:
            self._tell(tuple(spare.start()))
        return p.Started(pid=self._pid(wanted.container, ""))

    def execute(self, wanted: p.Execute) -> p.Started:
        with ExitStack() as undo:
            stdio = Stdio(self.relay, wanted)
            undo.callback(stdio.abandon)
            launch = runc.execute(
                RUNC, wanted.container, wanted.process, stdio=stdio.theirs, tty=stdio.tty, layout=self._cgroups()
            )
            undo.pop_all()
        self.pids[launch.pid] = stdio.attach(launch.console, Held(container=wanted.container, exec_id=wanted.exec_id))
        self._tell(launch.warnings)
        return p.Started(pid=launch.pid)

    def kill(self, wanted: p.Kill) -> None:
        runc.kill(RUNC, wanted.container, wanted.signal, everyone=wanted.everyone)

    def kill_exec(self, wanted: p.KillExec) -> None:
        pid = self._pid(wanted.container, wanted.exec_id)
        if pid:
            os.kill(pid, wanted.signal)  # our child, not yet reaped: the number is still its own

    def resize(self, wanted: p.Resize) -> None:
        held = self.pids.get(self._pid(wanted.container, wanted.exec_id))
        output = self.relay.outputs.get(held.console) if held is not None else None
        if output is not None:
            resize(output.fd, wanted.width, wanted.height)

    def update(self, wanted: p.Update) -> None:
        runc.update(RUNC, wanted.container, wanted.resources)

    def stats(self, wanted: p.Stats) -> dict[str, Any]:
        if wanted.container:
            return dict(runc.stats(RUNC, wanted.container))
        pod = cgroups.Cgroup(self._cgroups(), POD)
        return dict(pod.stats()) if pod.exists() else {}

    def delete(self, wanted: p.Delete) -> None:
        """Its processes, cgroup, mounts, streams."""
        runc.delete(RUNC, wanted.container, force=True, layout=self._cgroups())
        directory = f"{BUNDLES}/{wanted.container}"
        if os.path.isdir(directory):
            serial = self.roots.pop(wanted.container, "")
            drives.unmount_root(directory, "" if serial in self.roots.values() else serial)  # containers may share an image
            shutil.rmtree(directory)

    # ends

    def ended(self, pid: int, status: int) -> None:
        """A child of PID 1 was reaped."""
        if self.spares.ended(pid):
            self.say(p.Log(text=f"a container made ahead ended with wait status {status}"))
            return
        if pid == self.pod_init:
            self.pod_init = 0
            failure = PodInitDied(what="keep the pod's PID namespace", cause=f"its init ended with wait status {status}")
            self.say(p.Lost(failure={"code": failure.code, "what": failure.what, "cause": failure.cause}))
            return
        held = self.pids.pop(pid, None)
        if held is None:
            return  # an orphan
        if not held.exec_id and held.container in self.ahead:
            self.ahead.pop(held.container).forget()  # never started
        at_ns = time.time_ns()
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        oom = not held.exec_id and os.WIFSIGNALED(status) and self._oom_killed(held.container)
        self.relay.stop_input(held.stdin)
        for stream in held.streams:
            output = self.relay.outputs.get(stream)
            if output is not None:
                output.drain()
        self.say(p.Exit(container=held.container, exec_id=held.exec_id, code=code, at_ns=at_ns, oom_killed=oom))

    def _oom_killed(self, container: str) -> bool:
        """Its cgroup is younger than itself: any kill that was counted there was one of its own."""
        try:
            return runc.oom_kills(RUNC, container) > 0
        except NotFound:  # deleted by force meanwhile
            return False

    def _pid(self, container: str, exec_id: str) -> int:
        return next((pid for pid, held in self.pids.items() if (held.container, held.exec_id) == (container, exec_id)), 0)

    def _cgroups(self) -> cgroups.Layout:
        if self.layout is None:
            self.layout = cgroups.discover()
        return self.layout

    def _tell(self, warnings: tuple[str, ...]) -> None:
        for text in warnings:
            self.say(p.Log(text=text))


class Stdio:
    """The streams that a request names, opened on the channel, and the descriptors of a new process."""

    def __init__(self, relay: Relay, wanted: p.Create | p.Execute) -> None:
        document = wanted.config.get("process", {}) if isinstance(wanted, p.Create) else wanted.process
        self.tty = bool(document.get("terminal")) if isinstance(document, dict) else False
        self._relay, self._wanted = relay, wanted
        self._streams = _open_streams(relay.channel, wanted)
        self._ours: list[tuple[int, int]] = []  # (stream, descriptor)
        self._feed = -1
        self.theirs: tuple[int | None, int | None, int | None] = (None, None, None)
        if not self.tty:
            self.theirs = (self._input(), self._output(wanted.stdout), self._output(wanted.stderr))

    def _input(self) -> int | None:
        if not self._wanted.stdin:
            return None
        read, self._feed = os.pipe2(os.O_CLOEXEC)
        return read

    def _output(self, stream: int) -> int | None:
        if not stream:
            return None
        read, write = os.pipe2(os.O_CLOEXEC)
        self._ours.append((stream, read))
        return write

    def attach(self, console: int | None, held: Held) -> Held:
        """The process lives: relay what it says. Answers `held` with its streams in it."""
        self._close_theirs()
        if console is not None:
            if self._wanted.console:
                self._relay.console(self._wanted.console, console)
                held.console, held.streams = self._wanted.console, (self._wanted.console,)
            else:
                os.close(console)
            return held
        for stream, fd in self._ours:
            self._relay.output(stream, fd)
        if self._feed >= 0:
            self._relay.input(self._wanted.stdin, self._feed)
            held.stdin = self._wanted.stdin
        held.streams = tuple(stream for stream, _ in self._ours)
        return held

    def abandon(self) -> None:
        """There is no process: both directions of every stream are over."""
        self._close_theirs()
        for _, fd in self._ours:
            os.close(fd)
        if self._feed >= 0:
            os.close(self._feed)
        for stream in self._streams:
            self._relay.channel.end(stream)
            self._relay.channel.stop(stream)

    def _close_theirs(self) -> None:
        for fd in self.theirs:
            if fd is not None:
                os.close(fd)
        self.theirs = (None, None, None)


def _open_streams(channel: Channel, wanted: p.Create | p.Execute) -> list[int]:
    """In the order of their numbers, as the host opened them."""
    named = (
        (wanted.stdin, False, True),
        (wanted.stdout, True, False),
        (wanted.stderr, True, False),
        (wanted.console, True, True),
    )
    opened = []
    for stream, sends, receives in sorted(one for one in named if one[0]):
        channel.open(stream, sends=sends, receives=receives)
        opened.append(stream)
    return opened


def adapt(config: dict[str, Any], container: str, pod_init: int) -> dict[str, Any]:
    """The host's document as this guest can run it: the pod's namespaces are the guest's own. Raises Unsupported."""
    what = f"create container {container}"
    if any(config.get("hooks", {}).values()):
        raise Unsupported(what=what, cause="hooks are programs of the host", remedy="take `hooks` out of config.json")
    linux = dict(config.get("linux", {}))
    namespaces, inside = [], set()
    for one in linux.get("namespaces", ()):
        kind = one.get("type")
        if not one.get("path"):
            namespaces.append({"type": kind})
            inside.add(kind)
        elif kind == "pid" and pod_init:
            namespaces.append({"type": kind, "path": f"/proc/{pod_init}/ns/pid"})
        elif kind in ("user", "mount", "cgroup", "time"):
            raise Unsupported(what=what, cause=f"it joins the {kind} namespace {one['path']}, which is the host's")
    linux["namespaces"] = namespaces
    linux["cgroupsPath"] = f"{POD}/{container}"
    for key, value in linux.pop("sysctl", {}).items():
        machine.set_sysctl(key, value)
    adapted = config | {"linux": linux, "root": {**config.get("root", {}), "path": "rootfs"}}
    if "uts" not in inside:
        adapted.pop("hostname", None)  # the pod's, set already
        adapted.pop("domainname", None)
    adapted.pop("hooks", None)
    return adapted


def share_pids(containers: Containers) -> None:
    """From now on containers whose PID namespace is the pod's share one."""
    if not containers.pod_init:
        containers.pod_init = machine.fork_pid_init()
