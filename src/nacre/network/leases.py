"""Addresses in use, one file each, so that a daemon killed at any instant knows them again.

    DATA/network/leases/10.118.0.7    {"sandbox": …, "title": "default/web", "ports": […]}

A lease is written aside and linked to its address: link(2) fails if somebody holds it, so a lease is whole and has one holder even
between processes. Nothing is synced: after a power cut no pod lives, and a lost or torn file is an address that `collect` frees anyway.
A kill between the two writes leaves a file beginning with a dot, removed at the next load.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from nacre.network.types import PortMapping, RangeFull
from nacre.oci.errors import Invalid

FRESH_S = 180.0  # longer than any caller waits for a sandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    address: str
    sandbox_id: str  # empty: the file was torn
    title: str = ""
    ports: tuple[PortMapping, ...] = ()
    made_s: float = 0.0  # time.monotonic() of this process; 0: found on disk


class Leases:
    """All leases of one node. Safe for threads; `network` is the range that new ones are taken from."""

    def __init__(self, directory: str, network: ipaddress.IPv4Network) -> None:
        self._directory = directory
        self._first, self._last = int(network.network_address) + 2, int(network.broadcast_address) - 1  # + 1 is the gateway
        if self._last < self._first:
            raise Invalid(what="share out pod addresses", cause=f"pod_cidr {network} has none", remedy="use a /29 or larger")
        self._network = network
        self._next = self._first
        self._lock = threading.Lock()
        self._by_sandbox: dict[str, Lease] = {}
        self._taken: set[int] = set()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._load()

    def _load(self) -> None:
        for name in os.listdir(self._directory):
            path = f"{self._directory}/{name}"
            if name.startswith("."):
                os.unlink(path)
                continue
            lease = _read(path, name)
            self._by_sandbox[lease.sandbox_id or f"torn {name}"] = lease
            self._taken.add(int(ipaddress.IPv4Address(name)))

    def all(self) -> list[Lease]:
        with self._lock:
            return list(self._by_sandbox.values())

    def of(self, sandbox_id: str) -> Lease | None:
        with self._lock:
            return self._by_sandbox.get(sandbox_id)

    def reserve(self, sandbox_id: str, title: str, ports: Sequence[PortMapping]) -> Lease:
        """An address for the sandbox, on disk before it is used. Raises RangeFull."""
        with self._lock:
            aside = self._write_aside(sandbox_id, title, ports)
            try:
                address = self._claim(aside)
            finally:
                os.unlink(aside)
            lease = Lease(address=address, sandbox_id=sandbox_id, title=title, ports=tuple(ports), made_s=time.monotonic())
            self._by_sandbox[sandbox_id] = lease
            return lease

    def _write_aside(self, sandbox_id: str, title: str, ports: Sequence[PortMapping]) -> str:
        document = {"sandbox": sandbox_id, "title": title, "ports": [asdict(port) for port in ports]}
        aside = f"{self._directory}/.{os.getpid()}"
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(document, separators=(",", ":")).encode())
        finally:
            os.close(fd)
        return aside

    def without_ports(self, lease: Lease) -> Lease:
        """The lease goes on, its host ports are free for others."""
        with self._lock:
            aside = self._write_aside(lease.sandbox_id, lease.title, ())
            os.rename(aside, f"{self._directory}/{lease.address}")
            lease = self._by_sandbox[lease.sandbox_id] = replace(lease, ports=())
            return lease

    def is_fresh(self, lease: Lease) -> bool:
        """Made by this process so lately that a list of live sandboxes may not have it yet."""
        return lease.made_s > 0 and time.monotonic() - lease.made_s < FRESH_S

    def _claim(self, aside: str) -> str:
        """Link the file to the next free address; an address just freed comes last."""
        for _attempt in range(self._last - self._first + 1):
            number = self._next
            self._next = number + 1 if number < self._last else self._first
            if number in self._taken:
                continue
            self._taken.add(number)
            address = str(ipaddress.IPv4Address(number))
            try:
                os.link(aside, f"{self._directory}/{address}")
                return address
            except FileExistsError:
                continue  # another process of this node holds it
            except OSError:
                self._taken.discard(number)  # a full disk takes no address away
                raise
        held = sorted(self._by_sandbox.values(), key=lambda lease: lease.title)
        raise RangeFull(
            what="give the pod an address",
            cause=f"all {self._last - self._first + 1} addresses of {self._network} are leased, {len(held)} to known sandboxes",
            evidence=tuple(f"{lease.address} {lease.title or lease.sandbox_id}" for lease in held),
            remedy="remove pods, or set a larger pod_cidr",
        )

    def release(self, lease: Lease) -> None:
        """The address is free again; a lease that is gone is fine."""
        with self._lock:
            try:
                os.unlink(f"{self._directory}/{lease.address}")
            except FileNotFoundError:
                pass
            self._taken.discard(int(ipaddress.IPv4Address(lease.address)))
            for key, known in list(self._by_sandbox.items()):
                if known.address == lease.address:
                    del self._by_sandbox[key]


def _read(path: str, address: str) -> Lease:
    try:
        with open(path, "rb") as file:
            document = json.load(file)
        ports = tuple(PortMapping(**port) for port in document["ports"])
        return Lease(address=address, sandbox_id=document["sandbox"], title=document["title"], ports=ports)
    except (ValueError, KeyError, TypeError, Invalid):
        return Lease(address=address, sandbox_id="")
