"""The pods' address range: who else on this host uses it, and a free one for nodes that leave the choice to us."""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nacre.config import Config
from nacre.linux import links
from nacre.linux.netlink import NetlinkSocket
from nacre.network.types import RangeTaken
from nacre.oci.errors import Invalid

AUTO = "auto"
POOL = ipaddress.IPv4Network("10.119.0.0/16")  # where automatic ranges, of AUTO_PREFIX each, are taken from
AUTO_PREFIX = 24
LOCK = "/run/nacre-network.lock"


@dataclass(frozen=True, slots=True)
class Holder:
    network: ipaddress.IPv4Network
    who: str  # "route 10.1.0.0/16 through docker0", "address 10.1.0.1/16 of docker0"


@contextmanager
def one_node_at_a_time() -> Iterator[None]:
    """While nodes of this machine choose ranges or change what they share. The lock's file is gone afterwards."""
    while True:
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            here = os.stat(LOCK).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            here = False
        if here:
            break
        os.close(fd)  # its last holder removed it while we waited: ours is a file that nobody else sees
    try:
        yield
    finally:
        os.unlink(LOCK)
        os.close(fd)


def holders(bridge: str, *, on: NetlinkSocket | None = None) -> list[Holder]:
    """Every IPv4 network that this host routes or has an address in, except through `bridge`."""
    names = {link.index: link.name for link in links.list_links(on=on)}
    found = []
    for route in links.list_routes(on=on):
        if route.destination != "default" and names.get(route.index) != bridge:
            through = f"through {names[route.index]}" if route.index in names else "to nowhere"
            found.append(Holder(ipaddress.IPv4Network(route.destination), f"route {route.destination} {through}"))
    for address in links.list_addresses(on=on):
        name = names.get(address.index, "")
        if ":" not in address.address and name != bridge:
            network = ipaddress.IPv4Interface(address.address).network
            found.append(Holder(network, f"address {address.address} of {name}"))
    return found


def parse(config: Config) -> ipaddress.IPv4Network:
    """config.pod_cidr, not "auto". Raises Invalid."""
    try:
        return ipaddress.IPv4Network(config.pod_cidr, strict=False)
    except ValueError as error:
        raise Invalid(what="read pod_cidr", cause=str(error), remedy='write it as pod_cidr = "10.118.0.0/16"') from error


def choose(config: Config, *, on: NetlinkSocket | None = None) -> ipaddress.IPv4Network:
    """The range asked for, if nobody else holds it; for "auto" a free one, the same each time while it stays free.

    The caller holds `one_node_at_a_time` until the range is on its bridge. Raises RangeTaken naming the holder.
    """
    others = holders(config.bridge, on=on)
    if config.pod_cidr != AUTO:
        wanted = parse(config)
        holder = clash(wanted, others)
        if holder:
            raise taken(config, wanted, holder)
        return wanted
    candidates = list(POOL.subnets(new_prefix=AUTO_PREFIX))
    first = int.from_bytes(hashlib.sha256(config.instance.encode()).digest()[:4], "big") % len(candidates)
    for candidate in candidates[first:] + candidates[:first]:
        if clash(candidate, others) is None:
            return candidate
    raise RangeTaken(
        what="choose a range for pods",
        cause=f"no /{AUTO_PREFIX} of {POOL} is free on this host",
        evidence=tuple(holder.who for holder in others),
        remedy=f"set pod_cidr in {config.etc}/config.toml",
    )


def clash(wanted: ipaddress.IPv4Network, others: list[Holder]) -> Holder | None:
    return next((other for other in others if other.network.prefixlen and other.network.overlaps(wanted)), None)


def taken(config: Config, wanted: ipaddress.IPv4Network, holder: Holder) -> RangeTaken:
    return RangeTaken(
        what=f"use {wanted} for pods",
        cause=f"it overlaps the {holder.who}",
        remedy=f'set pod_cidr in {config.etc}/config.toml to a range that nobody routes, for example "{POOL}"',
    )
