"""What a VM pod's documents come to: what is refused, which cgroup, the network and the streams as the agent is told of them."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from nacre.agent import protocol
from nacre.kata.channel import Agent
from nacre.linux.cgroups import Cgroup, discover
from nacre.oci.errors import Invalid, Unsupported
from nacre.oci.handler import Sandbox, Stdio

_REMEDY = "run the pod without runtimeClassName: kata"


def check_sandbox(sandbox: Sandbox) -> None:
    """Refuse what a VM cannot be, before the host is touched."""
    what = f"create pod sandbox {sandbox.id[:12]}"
    for kind, field in (("network", "hostNetwork"), ("ipc", "hostIPC")):
        if kind not in sandbox.namespaces:
            raise Unsupported(
                what=what, cause=f"a virtual machine cannot share the host's {kind} ({field}: true)", remedy=_REMEDY
            )
    if "user" in sandbox.namespaces:
        raise Unsupported(
            what=what,
            cause="user namespaces (hostUsers: false) are not offered by the handler kata",
            remedy="leave hostUsers out",
        )


def load(path: str, what: str) -> dict[str, Any]:
    """The container's OCI document as the guest is to have it. Raises Invalid, Unsupported."""
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise Invalid(what=what, cause=f"{path}: {error}") from error
    linux = _member(config, "linux", dict, path)
    if not any(one.get("type") == "pid" for one in _objects(linux, "namespaces", path)):
        raise Unsupported(what=what, cause="a virtual machine cannot share the host's processes (hostPID: true)", remedy=_REMEDY)
    if config.get("hooks"):
        raise Unsupported(what=what, cause="hooks of the host cannot run inside a virtual machine", remedy=_REMEDY)
    rules = _objects(_member(linux, "resources", dict, path), "devices", path)
    privileged = any(one.get("allow") and not one.get("type") for one in rules)
    devices = _objects(linux, "devices", path)
    if devices and not privileged:
        named = devices[0].get("path")
        raise Unsupported(
            what=what, cause=f"{named} is a device of the host, which a virtual machine is not given", remedy=_REMEDY
        )
    linux.pop("devices", None)  # a privileged pod's were listed on the host: what it may use is the VM's
    loaded: dict[str, Any] = config
    return loaded


def _member(document: Any, name: str, kind: type, path: str) -> Any:
    """What `document` calls `name`, of that kind; an empty one when it is left out. Raises Invalid."""
    found = document.get(name) if isinstance(document, dict) else document
    if found is None:
        return kind()
    if not isinstance(found, kind):
        raise Invalid(what=f"read {path}", cause=f"{name} is no {'object' if kind is dict else 'list'}, or not in one")
    return found


def _objects(document: Any, name: str, path: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = _member(document, name, list, path)
    if not all(isinstance(one, dict) for one in listed):
        raise Invalid(what=f"read {path}", cause=f"{name} holds something else than objects")
    return listed


def group_path(sandbox: Sandbox) -> str:
    """The VM's own cgroup, below the pod's."""
    return f"{sandbox.cgroups_path}/{sandbox.id}"


def remove_groups(sandbox: Sandbox) -> None:
    Cgroup(discover(), group_path(sandbox)).remove()


def network(attachment: dict[str, Any], dns: tuple[str, ...]) -> protocol.Network:
    """network.Attachment for the agent."""
    return protocol.Network(
        interface=str(attachment["interface"]),
        mac=str(attachment.get("mac", "")),
        addresses=[str(one) for one in attachment["addresses"]],
        gateway=str(attachment.get("gateway") or ""),
        routes=[[str(destination), str(gateway or "")] for destination, gateway in attachment.get("routes") or []],
        mtu=int(attachment.get("mtu") or 1500),
        dns=list(dns),
    )


class Streams:
    """A process's standard streams, opened on the agent channel. Takes over the descriptors."""

    def __init__(self, agent: Agent, stdio: Stdio) -> None:
        self._agent = agent
        self.console: int | None = None  # our caller's half of a terminal
        self.numbers: dict[str, int] = {}
        if stdio.tty:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self.console = ours.detach()
            self.numbers["console"] = agent.console(theirs.detach())
            return
        for name, fd in (("stdin", stdio.stdin), ("stdout", stdio.stdout), ("stderr", stdio.stderr)):
            if fd is not None:
                self.numbers[name] = agent.inlet(fd) if name == "stdin" else agent.outlet(fd)

    def go(self) -> None:
        """The request that names them was answered."""
        self._agent.go(*self.numbers.values())

    def give_up(self) -> None:
        """The process did not come to be."""
        self._agent.give_up(*self.numbers.values())
        if self.console is not None:
            os.close(self.console)
            self.console = None


def shown(parameters: Any) -> Any:
    """A request for the recorder: file contents and entropy by their size only."""

    def masked(value: Any) -> Any:
        if isinstance(value, bytes):
            return f"({len(value)} bytes)"
        if isinstance(value, list | tuple):
            return [masked(one) for one in value]
        if hasattr(type(value), "__dataclass_fields__"):
            return {name: masked(getattr(value, name)) for name in type(value).__dataclass_fields__}
        return value

    return masked(parameters)
