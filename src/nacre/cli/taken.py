"""Which process holds a TCP port that a node wants. Read from /proc, no tool needed. (Address ranges: nacre.network.)"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from nacre.config import Config
from nacre.oci.errors import AlreadyExists

_LISTEN = "0A"  # st column of /proc/net/tcp, TCP_LISTEN


@dataclass(frozen=True, slots=True)
class Holder:
    what: str  # "127.0.0.1:17443"
    who: str  # "pid 812 (microk8s)"


class Taken(AlreadyExists):
    """A port that the node needs is in use."""


def port(address: str, number: int) -> Holder | None:
    """The process that listens on `number` at `address` or at every address; None when nobody does."""
    wanted = ipaddress.ip_address(address)
    for name in ("tcp", "tcp6"):
        for inode, bound in _listeners(f"/proc/net/{name}", number):
            mapped = getattr(bound, "ipv4_mapped", None) or bound
            if mapped == wanted or bound.is_unspecified or wanted.is_unspecified:
                return Holder(f"{address}:{number}", process_of_socket(inode))
    return None


def _listeners(path: str, number: int) -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    found = []
    try:
        with open(path) as file:
            rows = [line.split() for line in file.readlines()[1:]]
    except FileNotFoundError:  # no IPv6
        return []
    for row in rows:
        host, _, hex_port = row[1].partition(":")
        if row[3] == _LISTEN and int(hex_port, 16) == number:
            raw = bytes.fromhex(host)  # 32-bit words in the host's byte order
            words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            found.append((row[9], ipaddress.ip_address(words)))
    return found


def process_of_socket(inode: str) -> str:
    """ "pid N (name)" of a process with that socket open; a word that says why when none can be seen."""
    target = f"socket:[{inode}]"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
            if any(_link(f"/proc/{pid}/fd/{fd}") == target for fd in descriptors):
                return f"pid {pid} ({_command(pid)})"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return "a process of another user or PID namespace"


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""


def _command(pid: str) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


def require_free(config: Config) -> None:
    """Raise Taken, naming the holder and the setting to change, if the node could not get its ports."""
    path = f"{config.etc}/config.toml"
    for key, number in (("api_port", config.api_port), ("kubelet_port", config.kubelet_port)):
        holder = port(config.listen, number) if number else None
        if holder:
            raise Taken(
                what="start the node",
                cause=f"{key} {holder.what} is held by {holder.who}",
                remedy=f"set {key} in {path}, or stop that process",
            )
