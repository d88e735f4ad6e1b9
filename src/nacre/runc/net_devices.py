"""linux.netDevices: links of the runtime's network namespace that move into the container's (config-linux.md "Network Devices").

A link loses its addresses on the way and comes out down: the permanent global ones are given again, then it is set up. What the kernel
keeps by itself (MTU, hardware address, alias) stays. A create that fails brings the links back, before their namespace ends and
destroys them. Imported where it is needed: netlink is 5 ms of a command.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

from nacre.linux import links
from nacre.linux import rtnetlink as rt
from nacre.linux.libc import owned
from nacre.linux.netlink import Flag, NetlinkError, NetlinkSocket, Request
from nacre.oci.errors import Failure
from nacre.runc.failures import StepFailed

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_PERMANENT, _SCOPE_GLOBAL = 0x80, 0  # IFA_F_PERMANENT, RT_SCOPE_UNIVERSE
_OF_THE_KERNEL = 0x80 | 0x40 | 0x08 | 0x01  # permanent, tentative, duplicate, secondary: found out anew
_HINTS = {
    errno.ENODEV: "ip link shows the links that are there",
    errno.EEXIST: 'name it otherwise: linux.netDevices takes {"name": "NEW"}, or a template such as eth%d',
    errno.EINVAL: "loopback, bridges and links that others are built on cannot leave their namespace",
}


def move_in(devices: Mapping[str, Mapping[str, str]], pid: int, undo: ExitStack) -> None:
    """Move each into the network namespace of process `pid`; `undo` brings them back. Raises StepFailed."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    undo.callback(os.close, namespace)
    with NetlinkSocket() as here, NetlinkSocket(namespace) as there:
        for name, device in devices.items():
            wanted = device.get("name") or name
            try:
                if "%" not in wanted:
                    _refuse_taken(wanted, there)
                link, addresses = links.find(name, on=here), _addresses(name, here)
                moved = _move(link, here, namespace, there)
                undo.callback(_bring_back, link, addresses, moved, namespace)
                _settle(moved, wanted, addresses, there, up=True)
            except NetlinkError as error:
                raise _failed(name, wanted, error) from error


def _refuse_taken(name: str, there: NetlinkSocket) -> None:
    try:
        links.find(name, on=there)
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise
    else:
        raise NetlinkError("RTM_NEWLINK", errno.EEXIST, name, "the container has a link of that name")


def _addresses(name: str, on: NetlinkSocket) -> list[dict[str, Any]]:
    """The permanent global ones of a link, as the kernel tells them."""
    index = links.find(name, on=on).index
    found = on.dump(Request(rt.GETADDR, 0, rt.LINK_ADDRESS.encode({}, {}), "RTM_GETADDR"))
    told = [rt.LINK_ADDRESS.decode(message.body) for message in found]
    return [
        one
        for one in told
        if one["index"] == index and one["scope"] == _SCOPE_GLOBAL and one.get("flags", one["low_flags"]) & _PERMANENT
    ]


def _move(link: links.Link, source: NetlinkSocket, namespace: int, target: NetlinkSocket) -> int:
    """The link's index over there. It travels under a name of nobody's, by which it is found again."""
    passing = f"nacre{os.getpid()}"[:15]
    links.move(link.name, namespace, new_name=passing, on=source)
    return links.find(passing, on=target).index


def _settle(index: int, name: str, addresses: list[dict[str, Any]], on: NetlinkSocket, *, up: bool) -> None:
    on.transact(rt.set_link(index, name, name=name))
    for address in addresses:
        on.transact(_given_again(address, index))
    if up:
        on.transact(rt.set_link(index, name, up=True))


def _given_again(address: Mapping[str, Any], index: int) -> Request:
    flags = address.get("flags", address["low_flags"]) & ~_OF_THE_KERNEL
    fixed = {"family": address["family"], "prefix": address["prefix"], "low_flags": flags & 0xFF, "index": index}
    values = {key: address[key] for key in ("local", "address", "broadcast") if key in address}
    body = rt.LINK_ADDRESS.encode(fixed, values | ({"flags": flags} if flags else {}))
    return Request(rt.NEWADDR, Flag.CREATE | Flag.EXCL, body, "RTM_NEWADDR", str(values.get("local") or values.get("address")))


def _bring_back(link: links.Link, addresses: list[dict[str, Any]], index: int, namespace: int) -> None:
    with (
        owned(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as home,
        NetlinkSocket() as here,
        NetlinkSocket(namespace) as there,
    ):
        moved = next(one for one in links.list_links(on=there) if one.index == index)
        _settle(_move(moved, there, home, here), link.name, addresses, here, up=link.up)


def _failed(name: str, wanted: str, error: NetlinkError) -> Failure:
    what = f"move the network device {name} into the container" + (f" as {wanted}" if wanted != name else "")
    return StepFailed(what=what, cause=str(error), remedy=_HINTS.get(error.errno or 0, ""))
