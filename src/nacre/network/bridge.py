"""The node's bridge and the one host setting it needs, net.ipv4.ip_forward.

The bridge's alias, "nacre 10.118.0.0/16 ip_forward=0", says its range and what ip_forward was before the node came. It lives exactly as
long as the bridge, so it survives a killed daemon and needs no file. Order when coming: bridge, alias, then ip_forward; a kill in between
leaves a bridge that the next start finishes. When going: the last nacre bridge of this namespace restores the setting; one that goes
earlier hands its memory to another. Every change is made under ranges.one_node_at_a_time.
"""

from __future__ import annotations

import errno
import ipaddress
import re
from dataclasses import dataclass

from nacre.config import Config
from nacre.linux import links, rtnetlink
from nacre.linux.netlink import NetlinkError, NetlinkSocket
from nacre.network import ranges
from nacre.network.types import NetworkFailure, RangeTaken

IP_FORWARD = "/proc/sys/net/ipv4/ip_forward"
MTU_WITHOUT_ROUTE = 1500
_ALIAS = re.compile(r"nacre (?P<range>[0-9./]+) ip_forward=(?P<former>[01-])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    name: str
    index: int
    network: ipaddress.IPv4Network
    mtu: int
    notes: tuple[str, ...] = ()  # what could not be done, as sentences

    @property
    def gateway(self) -> str:
        return str(self.network.network_address + 1)


def mac_of(address: str) -> str:
    """A locally administered MAC that follows from the IPv4 address, so that neighbours' caches stay right when it is used again."""
    return "0e:6e:" + ipaddress.IPv4Address(address).packed.hex(":")


def ensure(config: Config) -> Bridge:
    """The bridge up, with address and alias, and ip_forward on; what is already so stays untouched (pods may be plugged in).

    Raises RangeTaken, or NetworkFailure when the kernel refuses.
    """
    with ranges.one_node_at_a_time(), NetlinkSocket() as sock:
        try:
            return _ensure(config, sock)
        except NetlinkError as error:
            raise NetworkFailure(
                what=f"make the bridge {config.bridge}", cause=str(error), remedy="modprobe bridge" if _missing(error) else ""
            ) from error


def _missing(error: OSError) -> bool:
    return error.errno in (errno.EOPNOTSUPP, errno.ENOENT)


def _ensure(config: Config, sock: NetlinkSocket) -> Bridge:
    link = _own(config, sock)
    alias = _ALIAS.match(link.alias) if link else None
    if link and alias and config.pod_cidr in (ranges.AUTO, alias["range"]):
        network = ipaddress.IPv4Network(alias["range"])
        other = ranges.clash(network, ranges.holders(config.bridge, on=sock))
        if other:
            raise ranges.taken(config, network, other)
    else:
        network = ranges.choose(config, on=sock)
        if link:
            _refuse_while_used(config, link, sock)
    former = alias["former"] if alias else _read_forward()
    gateway = str(network.network_address + 1)
    mtu = _mtu(config, sock)
    if link is None:
        links.create_bridge(config.bridge, mac=mac_of(gateway), mtu=mtu, on=sock)
        link = links.find(config.bridge, on=sock)
    _address(link, f"{gateway}/{network.prefixlen}", mac_of(gateway), sock)
    sock.transact(rtnetlink.set_link(link.index, link.name, alias=f"nacre {network} ip_forward={former}"))
    # Answers to the host's own 127.0.0.1 that were masqueraded come back through the bridge; rules.py guards loopback from pods.
    conf = {rtnetlink.DEVCONF_ROUTE_LOCALNET: 1}
    sock.transact(rtnetlink.set_link(link.index, link.name, up=True), rtnetlink.inet_conf(link.index, link.name, conf))
    note = _write_forward("1")
    return Bridge(name=config.bridge, index=link.index, network=network, mtu=mtu, notes=(note,) if note else ())


def _own(config: Config, sock: NetlinkSocket) -> links.Link | None:
    try:
        link = links.find(config.bridge, on=sock)
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise
        return None
    if link.kind != "bridge":
        raise NetworkFailure(
            what=f"make the bridge {config.bridge}",
            cause=f"there is a link of that name already, a {link.kind or 'hardware link'}",
            remedy=f"ip link set {config.bridge} name other0",
        )
    return link


def _refuse_while_used(config: Config, link: links.Link, sock: NetlinkSocket) -> None:
    """A bridge left over with another range may be given a new one only while nobody is plugged in."""
    ports = [other.name for other in links.list_links(on=sock) if other.master == link.index]
    if ports:
        raise RangeTaken(
            what=f"use {config.pod_cidr} for pods",
            cause=f"the bridge {link.name} has another range ({link.alias or 'unknown'}) and {len(ports)} links plugged in",
            evidence=tuple(ports),
            remedy="nacre down, then nacre up",
        )


def _address(link: links.Link, wanted: str, mac: str, sock: NetlinkSocket) -> None:
    """Exactly this IPv4 address on the bridge, and the MAC that follows from it."""
    have = [found.address for found in links.list_addresses(link.name, on=sock) if ":" not in found.address]
    for address in have:
        if address != wanted:
            links.delete_address(link.name, address, on=sock)
    if wanted not in have:
        links.add_address(link.name, wanted, on=sock)
    if link.mac != mac:
        links.set_mac(link.name, mac, on=sock)


def _mtu(config: Config, sock: NetlinkSocket) -> int:
    """That of the link the default route goes through: a pod's larger packets would be dropped or cut there."""
    by_index = {link.index: link for link in links.list_links(on=sock)}
    defaults = [route for route in links.list_routes(on=sock) if route.destination == "default" and route.index in by_index]
    defaults.sort(key=lambda route: route.metric)
    return by_index[defaults[0].index].mtu if defaults else MTU_WITHOUT_ROUTE


def _read_forward() -> str:
    try:
        with open(IP_FORWARD) as file:
            return file.read().strip()[:1]
    except OSError:
        return "-"


def _write_forward(value: str) -> str:
    """Set ip_forward; answers a sentence when it cannot be set, else nothing."""
    if _read_forward() == value:
        return ""
    try:
        with open(IP_FORWARD, "w") as file:
            file.write(value)
    except OSError as error:
        return f"net.ipv4.ip_forward cannot be set to {value} ({error.strerror}): pods reach this host and each other, nothing beyond"
    return ""


def remove(config: Config) -> list[str]:
    """The bridge goes, with everything plugged in, and ip_forward becomes what it was; answers sentences about what stays and why.

    Works from the kernel's state alone, so also after a kill and from another process. Nothing there is fine.
    """
    with ranges.one_node_at_a_time(), NetlinkSocket() as sock:
        everything = links.list_links(on=sock)
        own = next((link for link in everything if link.name == config.bridge and link.kind == "bridge"), None)
        if own is None:
            return []
        _delete([link.name for link in everything if link.master == own.index], sock)
        _delete([own.name], sock)
        alias = _ALIAS.match(own.alias)
        if alias is None or alias["former"] != "0":
            return []
        return _restore(own, [link for link in everything if link.kind == "bridge" and link.index != own.index], sock)


def _delete(names: list[str], sock: NetlinkSocket) -> None:
    for name in names:
        try:
            links.delete(name, on=sock)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise


def _restore(own: links.Link, bridges: list[links.Link], sock: NetlinkSocket) -> list[str]:
    """ip_forward was 0 before `own` came: who of the others still needs it?"""
    for other in bridges:
        alias = _ALIAS.match(other.alias)
        if alias:
            inherited = f"nacre {alias['range']} ip_forward=0"
            sock.transact(rtnetlink.set_link(other.index, other.name, alias=inherited))
            return [f"net.ipv4.ip_forward stays 1 for the node of {other.name}, which restores it"]
    later = [other.name for other in bridges if other.index > own.index and other.up]
    if later:  # made while it was on, so whoever made it may never have had to turn it on
        return [f"net.ipv4.ip_forward stays 1: {', '.join(later)} came while it was on and may need it"]
    note = _write_forward("0")
    return [note] if note else []
