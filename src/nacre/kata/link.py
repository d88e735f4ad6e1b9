"""The pod's link: its network namespace pinned on the host, and QEMU's tap moved into it, taking and giving its frames."""

from __future__ import annotations

import errno
import os

from nacre.kata.process import TAP
from nacre.linux import links, mounts, namespaces
from nacre.linux.libc import owned
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.linux.namespaces import Clone
from nacre.linux.netlink import NetlinkSocket


def pin_network(directory: str) -> None:
    """A new network namespace, held by a bind mount at DIRECTORY/net. For a process with one thread, which comes back."""
    os.makedirs(directory, exist_ok=True)
    pin = f"{directory}/net"
    os.close(os.open(pin, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
    with owned(namespaces.open_namespace("network")) as own:
        namespaces.unshare(Clone.NEWNET)
        try:
            mounts.mount("/proc/self/ns/net", pin, None, MountFlag.BIND)
        finally:
            namespaces.setns(own, Clone.NEWNET)


def unpin_network(directory: str) -> None:
    """Lazily; not pinned is fine."""
    try:
        mounts.umount2(f"{directory}/net", UnmountFlag.DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def join(qemu: int, netns: str, interface: str) -> None:
    """Move QEMU's tap out of its own empty namespace into `netns`, and join it to `interface` there, both ways."""
    with (
        owned(os.open(netns, os.O_RDONLY | os.O_CLOEXEC)) as target,
        owned(namespaces.open_namespace("network", qemu)) as empty,
    ):
        with NetlinkSocket(empty) as sock:
            links.move(TAP, target, on=sock)
        links.redirect(target, interface, TAP)


def adopt(path: str, directory: str) -> dict[str, object] | None:
    """Another engine's network namespace in the place of the one pinned at DIRECTORY/net; what its first link has, None without one."""
    unpin_network(directory)
    mounts.mount(path, f"{directory}/net", None, MountFlag.BIND)
    with owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as netns, NetlinkSocket(netns) as sock:
        found = next((one for one in links.list_links(on=sock) if not one.loopback), None)
        if found is None:
            return None
        addresses = [one.address for one in links.list_addresses(found.name, on=sock) if one.scope == 0]
        routes = [one for one in links.list_routes(on=sock) if one.index == found.index and one.gateway]
        return {
            "interface": found.name,
            "mac": found.mac,
            "addresses": addresses,
            "gateway": next((one.gateway for one in routes if one.destination == "default"), ""),
            "routes": [(one.destination, one.gateway) for one in routes],
            "mtu": found.mtu,
        }
