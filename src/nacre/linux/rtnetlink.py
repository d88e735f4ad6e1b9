"""rtnetlink(7) as tables: links, addresses, routes, and requests as values. Only encodes and decodes; `links` has the verbs.

Numbers are those of linux/rtnetlink.h, if_link.h, if_addr.h, veth.h, inetdevice.h.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any, Final

from nacre.linux.netlink import ADDRESS, MAC, NESTED, RAW, S32, TEXT, U8, U16, U32, Flag, Kind, Layout, Record, Request, Table

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26

IFF_UP = 0x1
IFF_LOOPBACK = 0x8
IFF_RUNNING = 0x40
IFA_F_NODAD = 0x02
IFA_F_PERMANENT = 0x80
RT_TABLE_MAIN = 254
RT_TABLE_LOCAL = 255
RTN_UNICAST = 1
RTPROT_BOOT = 3
SCOPE_UNIVERSE, SCOPE_LINK, SCOPE_HOST = 0, 253, 254
ADDR_GEN_EUI64, ADDR_GEN_NONE = 0, 1
DEVCONF_FORWARDING, DEVCONF_ROUTE_LOCALNET = 1, 26  # IPV4_DEVCONF_…: what sysctl net.ipv4.conf.LINK.… sets
LOOPBACK_INDEX: Final = 1  # of `lo` in every namespace

_IFINFO = "=BxHiII"
_IFINFO_FIELDS = ("family", "kind", "index", "up_flags", "change")


class _Peer:
    """VETH_INFO_PEER: a whole link message (structure, then link attributes) inside one attribute."""

    flag = NESTED

    def encode(self, value: dict[str, Any]) -> bytes:
        fixed = {name: value[name] for name in _IFINFO_FIELDS if name in value}
        return LINK.encode(fixed, {name: item for name, item in value.items() if name not in fixed})

    def decode(self, data: bytes) -> dict[str, Any]:
        return LINK.decode(data)


class _DevConf:
    """IFLA_INET_CONF as it is set: {DEVCONF number: value}; as it is read: the array of all values."""

    flag = NESTED

    def encode(self, value: dict[int, int]) -> bytes:
        return Table({str(number): (number, U32) for number in value}).encode(
            {str(number): item for number, item in value.items()}
        )

    def decode(self, data: bytes) -> bytes:
        return data


_INET: dict[str, tuple[int, Kind]] = {"conf": (1, _DevConf())}
_INET6: dict[str, tuple[int, Kind]] = {"flags": (1, U32), "addr_gen_mode": (8, U8)}
_AF_SPEC = Table({"inet": (socket.AF_INET, Table(_INET)), "inet6": (socket.AF_INET6, Table(_INET6))})
_BRIDGE_DATA = {"forward_delay": (1, U32), "stp_state": (5, U32), "vlan_filtering": (7, U8), "mcast_snooping": (23, U8)}
_INFO_DATA = Table({**_BRIDGE_DATA, "peer": (1, _Peer())})  # encoding only: which names fit depends on the link's kind
_PORT_DATA = Table({"hairpin": (4, U8)})
_INFO = Table({"kind": (1, TEXT), "data": (2, _INFO_DATA), "slave_kind": (4, TEXT), "slave_data": (5, _PORT_DATA)})
_INFO_READ = Table({"kind": (1, TEXT), "data": (2, RAW)})

_LINK: dict[str, tuple[int, Kind]] = {
    "mac": (1, MAC),
    "name": (3, TEXT),
    "mtu": (4, U32),
    "peer_index": (5, U32),
    "qdisc": (6, TEXT),
    "master": (10, U32),
    "queue_length": (13, U32),
    "operstate": (16, U8),
    "info": (18, _INFO),
    "alias": (20, TEXT),
    "af_spec": (26, _AF_SPEC),
    "group": (27, U32),
    "netns_fd": (28, U32),
    "peer_netns_id": (37, S32),
}
LINK = Layout(_IFINFO, _IFINFO_FIELDS, Table(_LINK))
LINK_READ = Layout(_IFINFO, _IFINFO_FIELDS, Table(_LINK | {"info": (18, _INFO_READ), "af_spec": (26, RAW)}))

_ADDRESS: dict[str, tuple[int, Kind]] = {
    "address": (1, ADDRESS),
    "local": (2, ADDRESS),
    "label": (3, TEXT),
    "broadcast": (4, ADDRESS),
    "cache": (6, Record("=IIII")),
    "flags": (8, U32),
}
LINK_ADDRESS = Layout("=BBBBi", ("family", "prefix", "low_flags", "scope", "index"), Table(_ADDRESS))

_ROUTE: dict[str, tuple[int, Kind]] = {
    "destination": (1, ADDRESS),
    "source": (2, ADDRESS),
    "oif": (4, U32),
    "gateway": (5, ADDRESS),
    "priority": (6, U32),
    "preferred_source": (7, ADDRESS),
    "metrics": (8, Table({"mtu": (2, U32)})),
    "table": (15, U32),
    "mark": (16, U32),
    "expires": (23, U32),
    "encapsulation_type": (21, U16),
}
ROUTE = Layout(
    "=BBBBBBBBI",
    ("family", "destination_length", "source_length", "tos", "table_id", "protocol", "scope", "kind", "flags"),
    Table(_ROUTE),
)


def has_ipv6() -> bool:
    """Whether the kernel knows IPv6; without it any IPv6 attribute is refused."""
    return os.path.isdir("/proc/sys/net/ipv6")


def new_link(name: str, kind: str = "", data: dict[str, Any] | None = None, *, up: bool = False, **values: Any) -> Request:
    """RTM_NEWLINK that makes a link; `values` are names of the link table (mac, mtu, master, …); an alias is set afterwards only."""
    info: dict[str, Any] = {"kind": kind}
    if data is not None:
        info["data"] = data
    fixed = {"up_flags": IFF_UP, "change": IFF_UP} if up else {}
    body = LINK.encode(fixed, {"name": name, **values, "info": info})
    return Request(NEWLINK, Flag.CREATE | Flag.EXCL, body, "RTM_NEWLINK", name)


def set_link(index: int, target: str, /, *, up: bool | None = None, **values: Any) -> Request:
    """RTM_NEWLINK that changes the link `index` called `target`, or the one called so when `index` is 0."""
    fixed = {"index": index}
    if up is not None:
        fixed |= {"up_flags": IFF_UP if up else 0, "change": IFF_UP}
    named = values if index else {"name": target} | values
    return Request(NEWLINK, 0, LINK.encode(fixed, named), "RTM_NEWLINK", target)


def quiet_link(index: int, target: str, **values: Any) -> Request:
    """A change by which the link gets no IPv6 link-local address by itself, so it sends nothing (address detection, router solicitation) unasked.

    Must come before the link is set up, in a request of its own: within one request the kernel sets the link up first.
    """
    return set_link(index, target, **values, af_spec={"inet6": {"addr_gen_mode": ADDR_GEN_NONE}})


def bridge_port(index: int, target: str, *, hairpin: bool) -> Request:
    """Whether the bridge may send a frame back out of the port it came from."""
    return set_link(index, target, info={"slave_kind": "bridge", "slave_data": {"hairpin": int(hairpin)}})


def inet_conf(index: int, target: str, values: dict[int, int]) -> Request:
    """Set DEVCONF_… numbers of one link, what sysctl net.ipv4.conf.LINK.… does, without /proc."""
    return set_link(index, target, af_spec={"inet": {"conf": values}})


def delete_link(name: str) -> Request:
    return Request(DELLINK, 0, LINK.encode({}, {"name": name}), "RTM_DELLINK", name)


def delete_group(group: int) -> Request:
    """RTM_DELLINK of all links of one group: the kernel waits for its readers once, not once a link."""
    return Request(DELLINK, 0, LINK.encode({}, {"group": group}), "RTM_DELLINK", f"group {group}")


def get_link(name: str) -> Request:
    return Request(GETLINK, 0, LINK.encode({}, {"name": name}), "RTM_GETLINK", name)


def address(index: int, interface: str, *, delete: bool = False, nodad: bool = True) -> Request:
    """RTM_NEWADDR or RTM_DELADDR of `interface`, "10.1.2.3/24", at the link `index`. IPv6 without address detection by default."""
    parsed = ipaddress.ip_interface(interface)
    host = str(parsed.ip)
    values: dict[str, Any] = {"local": host, "address": host}
    fixed = {"prefix": parsed.network.prefixlen, "index": index}
    if parsed.version == 4:
        fixed["family"] = socket.AF_INET
        if not delete and parsed.network.prefixlen < 31:
            values["broadcast"] = str(parsed.network.broadcast_address)
    else:
        fixed |= {"family": socket.AF_INET6, "low_flags": IFA_F_NODAD if nodad else 0}
    body = LINK_ADDRESS.encode(fixed, values)
    if delete:
        return Request(DELADDR, 0, body, "RTM_DELADDR", interface)
    return Request(NEWADDR, Flag.CREATE | Flag.EXCL, body, "RTM_NEWADDR", interface)


def route(
    destination: str,
    index: int,
    *,
    gateway: str = "",
    source: str = "",
    metric: int = 0,
    delete: bool = False,
    replace: bool = False,
) -> Request:
    """RTM_NEWROUTE or RTM_DELROUTE to `destination` ("default" or "10.0.0.0/8") through the link `index`, via `gateway` if given."""
    any_network = "::/0" if ":" in gateway else "0.0.0.0/0"
    network = ipaddress.ip_network(any_network if destination == "default" else destination)
    fixed = {
        "family": socket.AF_INET if network.version == 4 else socket.AF_INET6,
        "destination_length": network.prefixlen,
        "table_id": RT_TABLE_MAIN,
        "protocol": RTPROT_BOOT,
        "scope": SCOPE_UNIVERSE if gateway else SCOPE_LINK,
        "kind": RTN_UNICAST,
    }
    values: dict[str, Any] = {"oif": index}
    if network.prefixlen:
        values["destination"] = str(network.network_address)
    for name, item in (("gateway", gateway), ("preferred_source", source), ("priority", metric)):
        if item:
            values[name] = item
    body = ROUTE.encode(fixed, values)
    words = f"{destination} via {gateway}" if gateway else destination
    if delete:
        return Request(DELROUTE, 0, body, "RTM_DELROUTE", words)
    return Request(NEWROUTE, Flag.CREATE | (Flag.REPLACE if replace else Flag.EXCL), body, "RTM_NEWROUTE", words)
