"""Links, addresses and routes by their everyday verbs: what `ip link`, `ip address`, `ip route` do, without a process.

Every verb takes `on`, a NetlinkSocket of the namespace to act in; without it a socket of this thread's namespace is made and closed.
All raise NetlinkError (an OSError) with the kernel's words; a link that is not there is errno ENODEV. `redirect` joins two links.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nacre.linux import rtnetlink as rt
from nacre.linux.netlink import NetlinkError, NetlinkSocket, Request
from nacre.linux.traffic import redirect_requests

__all__ = [
    "Link",
    "LinkAddress",
    "Route",
    "add_address",
    "add_route",
    "create_bridge",
    "create_veth",
    "delete",
    "delete_address",
    "delete_route",
    "find",
    "list_addresses",
    "list_links",
    "list_routes",
    "lo_up",
    "move",
    "redirect",
    "rename",
    "set_down",
    "set_link",
    "set_mac",
    "set_mtu",
    "set_up",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    index: int
    name: str
    kind: str  # "bridge", "veth", "tun", …; empty for hardware and loopback
    mac: str
    mtu: int
    up: bool
    loopback: bool
    master: int  # index of the bridge it is plugged into; 0: none
    alias: str
    peer_index: int  # of a veth's other end, in that end's namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAddress:
    index: int  # of the link
    address: str  # "10.118.0.1/16"
    scope: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    destination: str  # "10.118.0.0/16", "default"
    gateway: str
    index: int  # of the link; 0 for blackhole and its like
    source: str
    metric: int
    table: int
    kind: int  # RTN_…


@contextmanager
def _socket(on: NetlinkSocket | None) -> Iterator[NetlinkSocket]:
    if on is not None:
        yield on
        return
    with NetlinkSocket() as made:
        yield made


def _link(message: dict[str, Any]) -> Link:
    info = message.get("info", {})
    return Link(
        index=message["index"],
        name=message.get("name", ""),
        kind=info.get("kind", ""),
        mac=message.get("mac", ""),
        mtu=message.get("mtu", 0),
        up=bool(message["up_flags"] & rt.IFF_UP),
        loopback=bool(message["up_flags"] & rt.IFF_LOOPBACK),
        master=message.get("master", 0),
        alias=message.get("alias", ""),
        peer_index=message.get("peer_index", 0),
    )


def find(name: str, *, on: NetlinkSocket | None = None) -> Link:
    """The link called `name`."""
    with _socket(on) as sock:
        for message in sock.transact(rt.get_link(name)):
            if message.type == rt.NEWLINK:
                return _link(rt.LINK_READ.decode(message.body))
    raise NetlinkError("RTM_GETLINK", errno.ENODEV, name)


def list_links(*, on: NetlinkSocket | None = None) -> list[Link]:
    with _socket(on) as sock:
        found = sock.dump(Request(rt.GETLINK, 0, rt.LINK.encode({}, {}), "RTM_GETLINK"))
    return [_link(rt.LINK_READ.decode(message.body)) for message in found if message.type == rt.NEWLINK]


def list_addresses(name: str = "", *, on: NetlinkSocket | None = None) -> list[LinkAddress]:
    """Addresses of both families, of one link or of all."""
    with _socket(on) as sock:
        wanted = find(name, on=sock).index if name else 0
        found = sock.dump(Request(rt.GETADDR, 0, rt.LINK_ADDRESS.encode({}, {}), "RTM_GETADDR"))
    addresses = []
    for message in found:
        fields = rt.LINK_ADDRESS.decode(message.body)
        host = fields.get("local") or fields.get("address")
        if host and (not wanted or fields["index"] == wanted):
            addresses.append(LinkAddress(index=fields["index"], address=f"{host}/{fields['prefix']}", scope=fields["scope"]))
    return addresses


def list_routes(*, table: int = rt.RT_TABLE_MAIN, family: int = socket.AF_INET, on: NetlinkSocket | None = None) -> list[Route]:
    """The routes of one table."""
    with _socket(on) as sock:
        found = sock.dump(Request(rt.GETROUTE, 0, rt.ROUTE.encode({"family": family}, {}), "RTM_GETROUTE"))
    routes = []
    for message in found:
        fields = rt.ROUTE.decode(message.body)
        if fields.get("table", fields["table_id"]) != table:
            continue
        length = fields["destination_length"]
        routes.append(
            Route(
                destination=f"{fields['destination']}/{length}" if fields.get("destination") and length else "default",
                gateway=fields.get("gateway", ""),
                index=fields.get("oif", 0),
                source=fields.get("preferred_source", ""),
                metric=fields.get("priority", 0),
                table=table,
                kind=fields["kind"],
            )
        )
    return routes


def create_bridge(
    name: str, *, mac: str = "", mtu: int = 0, alias: str = "", up: bool = True, on: NetlinkSocket | None = None
) -> Link:
    """A bridge without spanning tree, so that a new port forwards at once. A fixed `mac` keeps it from changing with its ports."""
    values = _given(mac=mac, mtu=mtu)
    data = {"forward_delay": 0, "stp_state": 0}
    with _socket(on) as sock:
        sock.transact(rt.new_link(name, "bridge", data, **values))
        with _undone(name, sock):
            sock.transact(*_finishing(0, name, alias=alias, up=up))
            return find(name, on=sock)


@contextmanager
def _undone(name: str, sock: NetlinkSocket) -> Iterator[None]:
    """A link that was made and cannot be finished goes again."""
    try:
        yield
    except BaseException:
        sock.transact(rt.delete_link(name))
        raise


def _finishing(index: int, name: str, *, alias: str, up: bool) -> list[Request]:
    """What the kernel does not take while it makes a link."""
    values = _given(alias=alias)
    requests = [rt.quiet_link(index, name, **values) if rt.has_ipv6() else rt.set_link(index, name, **values)]
    if up:
        requests.append(rt.set_link(index, name, up=True))
    return requests


def create_veth(
    name: str,
    peer: str,
    *,
    peer_netns_fd: int | None = None,
    master: int = 0,
    mac: str = "",
    peer_mac: str = "",
    mtu: int = 0,
    alias: str = "",
    up: bool = False,
    on: NetlinkSocket | None = None,
) -> None:
    """A pair of links: `name` here, plugged into the bridge `master` if given, `peer` born in the other namespace if one is given.

    `alias` and `up` are of this end.
    """
    other: dict[str, Any] = {"name": peer, **_given(mac=peer_mac, mtu=mtu)}
    if peer_netns_fd is not None:
        other["netns_fd"] = peer_netns_fd
    request = rt.new_link(name, "veth", {"peer": other}, **_given(mac=mac, mtu=mtu, master=master))
    with _socket(on) as sock:
        sock.transact(request)
        with _undone(name, sock):
            sock.transact(*_finishing(0, name, alias=alias, up=up))


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def set_link(name: str, /, *, on: NetlinkSocket | None = None, up: bool | None = None, **values: Any) -> None:
    """Change the link `name`; `values` are names of rtnetlink's link table."""
    with _socket(on) as sock:
        sock.transact(rt.set_link(find(name, on=sock).index, name, up=up, **values))


def set_up(name: str, *, on: NetlinkSocket | None = None) -> None:
    set_link(name, on=on, up=True)


def set_down(name: str, *, on: NetlinkSocket | None = None) -> None:
    set_link(name, on=on, up=False)


def set_mac(name: str, mac: str, *, on: NetlinkSocket | None = None) -> None:
    set_link(name, on=on, mac=mac)


def set_mtu(name: str, mtu: int, *, on: NetlinkSocket | None = None) -> None:
    set_link(name, on=on, mtu=mtu)


def rename(name: str, new: str, *, on: NetlinkSocket | None = None) -> None:
    """The link must be down (before Linux 6.2 up links keep their name)."""
    set_link(name, on=on, name=new)


def move(name: str, netns_fd: int, *, new_name: str = "", on: NetlinkSocket | None = None) -> None:
    """The link leaves for the namespace `netns_fd` (down, without addresses), under `new_name` if given."""
    values: dict[str, Any] = {"netns_fd": netns_fd, **_given(name=new_name)}
    set_link(name, on=on, **values)


def delete(name: str, *, on: NetlinkSocket | None = None) -> None:
    """The link goes; a veth takes its other end along."""
    with _socket(on) as sock:
        sock.transact(rt.delete_link(name))


def add_address(name: str, interface: str, *, on: NetlinkSocket | None = None) -> None:
    """Give the link an address, "10.1.2.3/24"; EEXIST when it has it."""
    with _socket(on) as sock:
        sock.transact(rt.address(find(name, on=sock).index, interface))


def delete_address(name: str, interface: str, *, on: NetlinkSocket | None = None) -> None:
    with _socket(on) as sock:
        sock.transact(rt.address(find(name, on=sock).index, interface, delete=True))


def add_route(
    destination: str, device: str, *, gateway: str = "", source: str = "", metric: int = 0, on: NetlinkSocket | None = None
) -> None:
    """A route to "default" or "10.0.0.0/8" through the link `device`."""
    with _socket(on) as sock:
        index = find(device, on=sock).index
        sock.transact(rt.route(destination, index, gateway=gateway, source=source, metric=metric))


def delete_route(destination: str, device: str, *, gateway: str = "", on: NetlinkSocket | None = None) -> None:
    with _socket(on) as sock:
        sock.transact(rt.route(destination, find(device, on=sock).index, gateway=gateway, delete=True))


def lo_up(*, on: NetlinkSocket | None = None) -> None:
    """The loopback link up; the kernel gives it 127.0.0.1 and ::1 by itself."""
    with _socket(on) as sock:
        sock.transact(rt.set_link(rt.LOOPBACK_INDEX, "lo", up=True))


def redirect(netns_fd: int | None, a: str, b: str) -> None:
    """Every frame that arrives at `a` leaves through `b`, and the other way round; both stand in the namespace `netns_fd`.

    The namespace's own stack sees none of these frames. Both links are set up. A frame keeps the state of its checksum: a veth's frames
    often bear only a partial one (offload), which a tap passes on in its vnet_hdr; a tap without vnet_hdr has the kernel finish them.
    Frames from the tap are redirected as if they had come from the veth's own stack, so the guest's offloads reach the bridge unsplit.
    """
    with NetlinkSocket(netns_fd) as sock:
        first, second = find(a, on=sock), find(b, on=sock)
        sock.transact(
            *redirect_requests(first.index, second.index, a),
            *redirect_requests(second.index, first.index, b),
            rt.set_link(first.index, a, up=True),
            rt.set_link(second.index, b, up=True),
        )
