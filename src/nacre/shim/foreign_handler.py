"""The pod's containers through another OCI runtime's command line (runc, crun, …), named as `[handlers.NAME] binary` in the configuration.

Namespaces, signals, counters and reaping are `RuncHandler`'s: such a runtime leaves its containers to the nearest subreaper, the
shim. Each command runs in a set-up child, in the container's bundle, where these files of ours lie for its duration:

    foreign.log   what it has to say, JSON lines      foreign.pid   the process it made      console.sock   where it sends a terminal
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal as signals
import socket
from typing import Any

from nacre.linux.cgroup_names import booted, resolve
from nacre.linux.cgroups import Cgroup
from nacre.oci.errors import Failure
from nacre.oci.handler import Sandbox, Stdio
from nacre.shim.processes import exit_code, in_child
from nacre.shim.runc_handler import RuncHandler, SharedHost, descriptors_of, standing

_LOG, _PID, _CONSOLE = "foreign.log", "foreign.pid", "console.sock"
_LAST = 4096  # bytes of a log that are read


class ForeignRuntimeFailed(Failure):
    """Another OCI runtime refused; its own words are the cause."""


class ForeignHandler(RuncHandler):
    """Handler over the binary in the sandbox's settings."""

    def __init__(self, host: SharedHost) -> None:
        super().__init__(host)
        self._binary = ""

    def create_sandbox(self, sandbox: Sandbox) -> dict[str, Any]:
        self._binary = str(sandbox.settings["binary"])
        if not os.access(self._binary, os.X_OK):
            raise ForeignRuntimeFailed(
                what=f"create pod sandbox {sandbox.id[:12]}",
                cause=f"the handler's runtime {self._binary or '(none named)'} is no program that can be executed",
                remedy="set binary under [handlers] in config.toml to the path of an OCI runtime",
            )
        return super().create_sandbox(sandbox)

    def _create(self, container: str, bundle: str, stdio: Stdio) -> tuple[int, str, int | None]:
        what = f"create container {container[:12]}"

        def work() -> tuple[dict[str, Any], list[int]]:
            os.chdir(bundle)
            with open("config.json", "rb") as file:
                group = resolve(json.load(file)["linux"]["cgroupsPath"], container, systemd=False).path
            words = ["create", "--bundle", bundle, "--pid-file", _PID]
            pid, console = self._launch(what, words, container, stdio)
            return {"pid": pid, "cgroup": group}, console

        answer, console = in_child(what, work, descriptors_of(stdio))
        return int(answer["pid"]), str(answer["cgroup"]), console[0] if console else None

    def _execute(self, container: str, process: dict[str, Any], stdio: Stdio) -> tuple[int, int | None]:
        what = f"run a command in container {container[:12]}"

        def work() -> tuple[dict[str, Any], list[int]]:
            os.chdir(self._bundle(container))
            with open("process.json", "w", encoding="utf-8") as file:
                json.dump(process, file)
            try:
                words = ["exec", "--detach", "--process", "process.json", "--pid-file", _PID]
                pid, console = self._launch(what, words, container, stdio)
            finally:
                os.unlink("process.json")
            return {"pid": pid}, console

        answer, console = in_child(what, work, descriptors_of(stdio))
        return int(answer["pid"]), console[0] if console else None

    def start(self, container: str) -> int:
        what = f"start container {container[:12]}"
        in_child(what, lambda: self._command(what, container, "start"))
        return self._pids.get((container, ""), 0)

    def update(self, container: str, resources: dict[str, Any]) -> None:
        def work() -> tuple[dict[str, Any], list[int]]:
            read, write = os.pipe()
            os.write(write, json.dumps(resources).encode())
            os.close(write)
            os.dup2(read, 0)
            return self._command("update resources", container, "update", "--resources", "-")

        in_child("update resources", work)

    def _delete(self, container: str) -> None:
        if (container, "") in self._pids:  # a runtime waits for the end of what it kills
            Cgroup(self._layout, self._groups[container].path).kill(signals.SIGKILL)
        what = f"delete container {container[:12]}"
        in_child(what, lambda: self._command(what, container, "delete", "--force"))

    # in the set-up child

    def _bundle(self, container: str) -> str:
        return f"{self.sandbox.directory}/containers/{container}"

    def _command(self, what: str, container: str, *words: str) -> tuple[dict[str, Any], list[int]]:
        os.chdir(self._bundle(container))
        self._run(what, [*words, container], (0, 2, 2))
        return {}, []

    def _launch(self, what: str, words: list[str], container: str, stdio: Stdio) -> tuple[int, list[int]]:
        """Run a command that leaves a process behind: (its pid, [console])."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            if stdio.tty:
                listener.bind(_CONSOLE)  # relative: a path could be longer than sun_path
                listener.listen(1)
                words = [*words, "--console-socket", _CONSOLE]
            try:
                with standing(stdio) as descriptors:
                    self._run(what, [*words, container], descriptors)
                console = [_received(listener)] if stdio.tty else []
            finally:
                _gone(_CONSOLE)
        with open(_PID, encoding="ascii") as file:
            pid = int(file.read())
        os.unlink(_PID)
        return pid, console

    def _run(self, what: str, words: list[str], stdio: tuple[int, int, int]) -> None:
        driver = ["--systemd-cgroup"] if booted() and self.sandbox.cgroups_path.endswith(".slice") else []
        command = [self._binary, "--root", self.root, "--log", _LOG, "--log-format", "json", *driver, *words]
        for signal in (signals.SIGCHLD, signals.SIGINT):
            signals.signal(signal, signals.SIG_DFL)
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(_apart(stdio))]
        _gone(_LOG)
        try:
            pid = os.posix_spawn(self._binary, command, os.environ, file_actions=actions)
        except OSError as error:
            raise ForeignRuntimeFailed(what=what, cause=f"execute {self._binary}: {error.strerror}") from error
        _pid, status = os.waitpid(pid, 0)
        if status:
            raise _refusal(what, self._binary, " ".join(command), exit_code(status))
        _gone(_LOG)


def _apart(stdio: tuple[int, int, int]) -> list[int]:
    """Copies above the standard descriptors: each may stand where another has to go."""

    return [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in stdio]


def _received(listener: socket.socket) -> int:
    """The terminal's master, as the runtime sent it."""
    connection, _address = listener.accept()
    with connection:
        _data, ancillary, _flags, _from = connection.recvmsg(256, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    return array.array("i", ancillary[0][2])[0]


def _refusal(what: str, binary: str, command: str, code: int) -> ForeignRuntimeFailed:
    """The runtime's last error, and the command ready to paste."""
    said: list[str] = []
    try:
        with open(_LOG, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST))
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            said.append(str(json.loads(line)["msg"]).strip())
        except (ValueError, KeyError, TypeError):
            said.append(line.decode("utf-8", "replace"))
    cause = said[-1] if said else f"exit code {code}"
    name = os.path.basename(binary)
    return ForeignRuntimeFailed(what=what, cause=f"{name}: {cause}", evidence=(*said[:-1], f"cd {os.getcwd()} && {command}"))


def _gone(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
