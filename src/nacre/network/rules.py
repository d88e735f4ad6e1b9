"""The node's nftables table, `ip INSTANCE`: what is masqueraded, what is forwarded to pods' host ports, what pods may not reach.

    map host_ports     protocol . port            : pod address . pod port     every address of the host
    map host_ports_at  address . protocol . port  : pod address . pod port     one address of the host
    chain prerouting, output   destination NAT by the two maps, for packets from outside, from pods, and from the host itself
    chain postrouting          pods to anywhere else: masqueraded. Pods and the host's loopback to a host port of a pod: masqueraded too,
                               else the answer would go past us (hairpin)
    chain forward              counts and accepts what goes to and from the bridge. Another table's DROP stays final (see findings.py)
    chain guard                127.0.0.0/8 cannot be reached from the bridge, though the bridge has route_localnet for the hairpin

A host port is one element: adding or taking one does not touch rules. Callers on a hot path hand in a socket and keep it open: the kernel
waits for the last transaction's garbage when the socket that made it is closed (16 ms here).
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable, Sequence

from nacre.linux import nftables as nft
from nacre.linux.netlink import NetlinkError, NetlinkSocket
from nacre.network.types import PROTOCOLS, PortMapping

FAMILY = "ip"
_ANY, _AT = "host_ports", "host_ports_at"


def install(table: str, bridge: str, cidr: str, ports: Iterable[tuple[PortMapping, str]]) -> None:
    """Make the table, or replace it whole in one transaction; `ports` are (mapping, pod address)."""
    batch = nft.Batch(FAMILY, table)
    batch.table()
    batch.drop_table()  # made first so that this never fails, then made again
    batch.table()
    target = (nft.Type.ipv4_addr, nft.Type.inet_service)
    batch.map(_ANY, (nft.Type.inet_proto, nft.Type.inet_service), target)
    batch.map(_AT, (nft.Type.ipv4_addr, nft.Type.inet_proto, nft.Type.inet_service), target)
    for name, hook in (("prerouting", nft.Hook.prerouting), ("output", nft.Hook.output)):
        batch.chain(name, "nat", hook, nft.Priority.dstnat)
        _host_port_rules(batch, name)
    batch.chain("postrouting", "nat", nft.Hook.postrouting, nft.Priority.srcnat)
    leaving, arriving = nft.interface(nft.Meta.oifname, bridge), nft.interface(nft.Meta.iifname, bridge)
    for source in (cidr, "127.0.0.0/8"):
        batch.rule("postrouting", nft.within(nft.source_address(), source), leaving, nft.was_dnatted(), nft.masquerade())
    pods = nft.within(nft.source_address(), cidr)
    elsewhere = nft.within(nft.destination_address(), cidr, inside=False)
    batch.rule("postrouting", pods, elsewhere, nft.masquerade())
    batch.chain("forward", "filter", nft.Hook.forward, nft.Priority.filter)
    for crossing in (arriving, leaving):
        batch.rule("forward", crossing, nft.counter(), nft.verdict(nft.Verdict.accept))
    batch.chain("guard", "filter", nft.Hook.prerouting, nft.Priority.raw)
    batch.rule("guard", arriving, nft.within(nft.destination_address(), "127.0.0.0/8"), nft.verdict(nft.Verdict.drop))
    _put(batch, ports)
    batch.commit()


def _host_port_rules(batch: nft.Batch, chain: str) -> None:
    first = nft.R0
    one = [nft.destination_address(first), nft.meta(nft.Meta.l4proto, first + 1), nft.destination_port(first + 2)]
    batch.rule(chain, one, nft.lookup(_AT), nft.dnat())
    every = [nft.meta(nft.Meta.l4proto, first), nft.destination_port(first + 1)]
    batch.rule(chain, nft.destination_is_local(), every, nft.lookup(_ANY), nft.dnat())


def _key(port: PortMapping) -> tuple[str, bytes]:
    """(map, key)."""
    parts = (bytes([PROTOCOLS[port.protocol]]), port.host_port.to_bytes(2, "big"))
    if port.any_address:
        return _ANY, nft.concatenated(*parts)
    return _AT, nft.concatenated(ipaddress.IPv4Address(port.host_ip).packed, *parts)


def _put(batch: nft.Batch, ports: Iterable[tuple[PortMapping, str]]) -> None:
    pairs: dict[str, dict[bytes, bytes]] = {_ANY: {}, _AT: {}}
    for port, address in ports:
        name, key = _key(port)
        target = nft.concatenated(ipaddress.IPv4Address(address).packed, port.container_port.to_bytes(2, "big"))
        pairs[name][key] = target
    for name, items in pairs.items():
        batch.elements(name, items.items())


def add_ports(table: str, ports: Iterable[PortMapping], address: str, *, on: NetlinkSocket | None = None) -> None:
    """Forward host ports to the pod at `address`; all or none. EEXIST: one of them is forwarded already."""
    batch = nft.Batch(FAMILY, table)
    _put(batch, ((port, address) for port in ports))
    batch.commit(on)


def drop_ports(table: str, ports: Sequence[PortMapping], *, on: NetlinkSocket | None = None) -> None:
    """Stop forwarding; a port or table that is gone is fine."""
    keys = [_key(port) for port in ports]
    try:
        _drop(table, keys, on)
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        for key in keys:  # one of them was gone and took the others' transaction along
            try:
                _drop(table, [key], on)
            except NetlinkError as single:
                if single.errno != errno.ENOENT:
                    raise


def _drop(table: str, keys: Iterable[tuple[str, bytes]], on: NetlinkSocket | None) -> None:
    batch = nft.Batch(FAMILY, table)
    for name, key in keys:
        batch.drop_elements(name, [key])
    batch.commit(on)


def remove(table: str) -> None:
    """The table goes; gone already is fine."""
    try:
        nft.delete_table(FAMILY, table)
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
