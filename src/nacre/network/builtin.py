"""Pods on nacre's own bridge: a veth pair, an address, a default route, host ports.

A pod's links are deleted by a thread that lives while there is something to delete: the kernel takes 16 to 24 ms to be sure that nobody
looks at a link any more, as long for many at once as for one. Until then the address stays leased, so it never has two owners.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from nacre.config import Config
from nacre.linux import links, rtnetlink
from nacre.linux import nftables as nft
from nacre.linux.libc import owned
from nacre.linux.netlink import NetlinkError, NetlinkSocket, Request
from nacre.network import bridge, rules
from nacre.network.leases import Lease, Leases
from nacre.network.types import (
    INTERFACE,
    Attachment,
    HostPortTaken,
    NetworkFailure,
    NetworkNotReady,
    NetworkStatus,
    PodNetwork,
    PortMapping,
)
from nacre.oci.errors import from_exception

ALIAS_LIMIT = 200  # the kernel keeps 255 bytes
_log = logging.getLogger(__name__)


def link_name(sandbox_id: str) -> str:
    """The host's end of a pod's veth pair: follows from the sandbox, so it can be found without any record."""
    return "nv" + hashlib.sha256(sandbox_id.encode()).hexdigest()[:12]


class BuiltinNetwork:
    """The bridge of one node. All methods block and may be called from several threads; `stop` also from a process that never started it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._bridge: bridge.Bridge | None = None
        self._leases: Leases | None = None
        self._nft: NetlinkSocket | None = None
        self._nft_lock = threading.Lock()
        self._ports_lock = threading.Lock()
        self._remover = _Remover(int(hashlib.sha256(config.instance.encode()).hexdigest()[:7], 16) | 1 << 28)

    # The node

    def start(self) -> None:
        """Bridge, rules and leases, new or as a former daemon left them. Raises RangeTaken, NetworkFailure."""
        made = bridge.ensure(self._config)
        leases = Leases(f"{self._config.data}/network/leases", made.network)
        ports = [(port, lease.address) for lease in leases.all() for port in lease.ports]
        try:
            rules.install(self._config.instance, made.name, str(made.network), ports)
        except NetlinkError as error:
            raise NetworkFailure(
                what=f"make the nftables table ip {self._config.instance}",
                cause=str(error),
                remedy="modprobe nf_tables nft_masq nft_nat nft_fib_ipv4 nft_ct",
            ) from error
        self._nft = nft.open_socket()
        self._bridge, self._leases = made, leases
        for note in made.notes:
            _log.warning("%s", note)

    def close(self) -> None:
        """The daemon goes, the pods stay: wait for links being deleted, close what is open."""
        self._remover.settle()
        with self._nft_lock:
            if self._nft is not None:
                self._nft.close()
                self._nft = None
        self._bridge = None

    def stop(self) -> list[str]:
        """Nothing of the node's network is left; answers sentences about what stays and why."""
        self.close()
        rules.remove(self._config.instance)
        notes = bridge.remove(self._config)
        directory = f"{self._config.data}/network/leases"
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            os.unlink(f"{directory}/{name}")
        self._leases = None
        return notes

    def status(self) -> NetworkStatus:
        if self._bridge is None:
            return NetworkStatus(ready=False, reason="NetworkNotReady", message="the node's bridge is not made yet")
        return NetworkStatus(ready=True, message="; ".join(self._bridge.notes))

    @property
    def cidr(self) -> str:
        return str(self._started()[0].network)

    @property
    def gateway(self) -> str:
        return self._started()[0].gateway

    def _started(self) -> tuple[bridge.Bridge, Leases]:
        if self._bridge is None or self._leases is None:
            raise NetworkNotReady(what="use the pod network", cause="the node's bridge is not made yet", remedy="nacre up")
        return self._bridge, self._leases

    # A pod

    def attach(self, pod: PodNetwork, netns: str) -> Attachment:
        """eth0 in the namespace at path `netns`, plugged into the bridge. A failure takes back everything done before it.

        A sandbox attached before is attached anew. Raises RangeFull, HostPortTaken, NetworkFailure, NetworkNotReady.
        """
        made, leases = self._started()
        if leases.of(pod.sandbox_id):
            self.detach(pod.sandbox_id)
            self._remover.settle()
        ports = tuple(port for port in pod.ports if port.host_port)
        lease = self._reserve(pod, ports, leases)
        with ExitStack() as undo:
            undo.callback(leases.release, lease)
            try:
                undo.callback(_delete, link_name(pod.sandbox_id))
                _plug(pod, netns, lease, made)
                if ports:
                    with self._nft_lock:
                        rules.add_ports(self._config.instance, ports, lease.address, on=self._nft)
            except OSError as error:
                raise _failure(pod, netns, error) from error
            undo.pop_all()
        return Attachment(
            mac=bridge.mac_of(lease.address),
            addresses=[f"{lease.address}/{made.network.prefixlen}"],
            gateway=made.gateway,
            routes=[("0.0.0.0/0", made.gateway)],
            mtu=made.mtu,
        )

    def _reserve(self, pod: PodNetwork, ports: tuple[PortMapping, ...], leases: Leases) -> Lease:
        if not ports:
            return leases.reserve(pod.sandbox_id, pod.title, ())
        with self._ports_lock:  # else two pods could find the same port free
            for lease in leases.all():
                for wanted in ports:
                    if any(_same(wanted, held) for held in lease.ports):
                        raise HostPortTaken(
                            what=f"forward host port {wanted} to pod {pod.title}",
                            cause=f"it is forwarded to pod {lease.title or lease.sandbox_id} at {lease.address}",
                            remedy="give one of the pods another hostPort",
                        )
            for wanted in ports:
                _require_unbound(pod, wanted)
            return leases.reserve(pod.sandbox_id, pod.title, ports)

    def detach(self, sandbox_id: str) -> None:
        """Host ports go at once; link and address within the next 50 ms or so (`settle` waits for it). Nothing there is fine."""
        leases = self._started()[1]
        lease = leases.of(sandbox_id)
        name = link_name(sandbox_id)
        if lease is None:
            self._remover.add(name, lambda: None)  # a link without a lease is possible only if someone removed the lease's file
            return
        if lease.ports:
            with self._nft_lock:
                rules.drop_ports(self._config.instance, lease.ports, on=self._nft)
            lease = leases.without_ports(lease)
        self._remover.add(name, partial(leases.release, lease))

    def settle(self) -> None:
        """Wait until everything detached so far is gone."""
        self._remover.settle()

    def collect(self, live: set[str]) -> None:
        """Take away what belongs to no sandbox of `live`: leases, links, host ports. Attachments of the last minutes are left alone."""
        made, leases = self._started()
        kept = set()
        for lease in leases.all():
            if lease.sandbox_id in live or leases.is_fresh(lease):
                kept.add(link_name(lease.sandbox_id))
            elif lease.sandbox_id:
                _log.info("address %s of %s is freed: its sandbox is gone", lease.address, lease.title or lease.sandbox_id)
                self.detach(lease.sandbox_id)
            else:
                leases.release(lease)
        kept |= {link_name(sandbox_id) for sandbox_id in live}
        for link in links.list_links():
            if link.master == made.index and link.name not in kept:
                self._remover.add(link.name, lambda: None)
        self._remover.settle()


def _plug(pod: PodNetwork, netns: str, lease: Lease, made: bridge.Bridge) -> None:
    name = link_name(pod.sandbox_id)
    with owned(os.open(netns, os.O_RDONLY | os.O_CLOEXEC)) as fd, NetlinkSocket() as host:
        peer = {"name": INTERFACE, "mac": bridge.mac_of(lease.address), "mtu": made.mtu, "netns_fd": fd}
        pair = rtnetlink.new_link(name, "veth", {"peer": peer}, master=made.index, mtu=made.mtu)
        plugged = [_quiet(0, name, alias=pod.title[:ALIAS_LIMIT]), rtnetlink.set_link(0, name, up=True)]
        if lease.ports:
            # With bridge-nf-call-iptables on, a pod's packet to its own host port is rewritten inside the bridge and goes back as a frame.
            # Only for these pods, since a hairpin port also hears its own broadcasts.
            plugged.append(rtnetlink.bridge_port(0, name, hairpin=True))
        try:
            host.transact(pair, *plugged)
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            _delete(name)  # left by a killed daemon; if it is the pod's eth0 that exists, the second attempt says so
            host.transact(pair, *plugged)
        with NetlinkSocket(fd) as inside:
            index = links.find(INTERFACE, on=inside).index
            inside.transact(
                rtnetlink.set_link(rtnetlink.LOOPBACK_INDEX, "lo", up=True),
                _quiet(index, INTERFACE),
                rtnetlink.set_link(index, INTERFACE, up=True),
                rtnetlink.address(index, f"{lease.address}/{made.network.prefixlen}"),
                rtnetlink.route("default", index, gateway=made.gateway),
            )


def _quiet(index: int, name: str, **values: Any) -> Request:
    return rtnetlink.quiet_link(index, name, **values) if rtnetlink.has_ipv6() else rtnetlink.set_link(index, name, **values)


def _delete(name: str) -> None:
    try:
        links.delete(name)
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise


def _same(one: PortMapping, other: PortMapping) -> bool:
    if (one.protocol, one.host_port) != (other.protocol, other.host_port):
        return False
    return one.any_address or other.any_address or one.host_ip == other.host_ip


def _require_unbound(pod: PodNetwork, port: PortMapping) -> None:
    """Raise HostPortTaken if a process of the host has the port: forwarding would silently take it away from that process."""
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    if port.protocol not in kinds:
        return
    with socket.socket(socket.AF_INET, kinds[port.protocol]) as trial:
        if port.protocol == "tcp":
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
        try:
            trial.bind((port.host_ip or "0.0.0.0", port.host_port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return  # an address that the host does not have yet
            raise HostPortTaken(
                what=f"forward host port {port} to pod {pod.title}",
                cause=f"a process of this host has it: bind(2): {error.strerror}",
                remedy=f"ss -lnp 'sport = :{port.host_port}' names the process",
            ) from error


def _failure(pod: PodNetwork, netns: str, error: OSError) -> NetworkFailure:
    what = f"connect pod {pod.title} to the network"
    if isinstance(error, NetlinkError):
        remedies = {errno.EOPNOTSUPP: "modprobe veth"}
        return NetworkFailure(
            what=what, cause=str(error), evidence=(f"namespace {netns}",), remedy=remedies.get(error.errno or 0, "")
        )
    known = from_exception(what, error)
    return NetworkFailure(what=what, cause=known.cause, evidence=(f"namespace {netns}",))


class _Remover:
    """Deletes links in a thread of its own, all that wait in one go, and then calls back for each."""

    def __init__(self, group: int) -> None:
        self._group = group  # of links: the kernel deletes a whole group at once
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def add(self, name: str, then: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.setdefault(name, []).append(then)  # a second asker does not take the first one's word away
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nacre-links")
                self._thread.start()

    def settle(self) -> None:
        while True:
            with self._lock:
                thread = self._thread
            if thread is None:
                return
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, {}
                if not batch:
                    self._thread = None
                    return
            try:
                self._delete(list(batch))
                for callbacks in batch.values():
                    for then in callbacks:
                        then()
            except OSError as error:  # their addresses stay leased; `collect` tries again
                _log.warning("links %s cannot be deleted: %s", ", ".join(batch), error)

    def _delete(self, names: list[str]) -> None:
        with NetlinkSocket() as sock:
            if len(names) > 1:
                for requests in (
                    [rtnetlink.set_link(0, name, group=self._group) for name in names],
                    [rtnetlink.delete_group(self._group)],
                ):
                    try:
                        sock.transact(*requests)
                    except NetlinkError:
                        continue  # some went with their namespace meanwhile; the round below meets any other reason again
            for name in names:
                try:
                    sock.transact(rtnetlink.delete_link(name))
                except NetlinkError as error:
                    if error.errno != errno.ENODEV:
                        raise
