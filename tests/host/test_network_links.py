"""Links, addresses, routes, taps and redirects in namespaces of the test's own, seen by pyroute2, `ip` and real packets."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct

import pytest
from network_support import Namespace, checksum, host_socket, ipv4, namespaces, output, own_network

from nacre.linux import links, tap
from nacre.linux.netlink import NetlinkError, NetlinkSocket

GUEST_MAC = bytes.fromhex("02aabbccddee")


def shown(*arguments: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(output("ip", "-d", "-j", *arguments) or "[]")
    return found


@own_network
def test_a_bridge_is_what_ip_shows() -> None:
    link = links.create_bridge("br9", mac="02:00:00:00:09:01", mtu=1400, alias="a test")
    links.add_address("br9", "10.9.0.1/16")
    (seen,) = shown("address", "show", "br9")
    assert (seen["address"], seen["mtu"], seen["ifalias"]) == ("02:00:00:00:09:01", 1400, "a test")
    assert seen["linkinfo"]["info_kind"] == "bridge" and seen["linkinfo"]["info_data"]["stp_state"] == 0  # type: ignore[index]
    assert [(a["local"], a["prefixlen"], a["broadcast"]) for a in seen["addr_info"]] == [("10.9.0.1", 16, "10.9.255.255")]  # type: ignore[attr-defined]
    assert (link.alias, link.mtu, link.up, link.kind) == ("a test", 1400, True, "bridge")
    assert [address.address for address in links.list_addresses("br9")] == ["10.9.0.1/16"]


@own_network
def test_the_codec_and_pyroute2_see_the_same() -> None:
    from pyroute2 import IPRoute

    links.create_veth("left", "right", mac="02:00:00:00:00:0a", peer_mac="02:00:00:00:00:0b", up=True)
    links.set_up("right")
    links.add_address("left", "10.8.0.1/24")
    links.add_route("10.77.0.0/16", "left", gateway="10.8.0.9", metric=50)
    links.add_route("default", "left", gateway="10.8.0.9")
    with IPRoute() as eye:
        theirs = {(link["index"], link.get("ifname"), link.get("address"), link.get("mtu")) for link in eye.get_links()}
        routes = {
            (
                f"{route.get('dst')}/{route['dst_len']}" if route.get("dst") else "default",
                route.get("gateway") or "",
                route.get("oif"),
            )
            for route in eye.get_routes(family=socket.AF_INET, table=254)
        }
    assert {(link.index, link.name, link.mac, link.mtu) for link in links.list_links()} == theirs
    assert {(route.destination, route.gateway, route.index) for route in links.list_routes()} == routes
    assert {"default", "10.77.0.0/16", "10.8.0.0/24"} == {route.destination for route in links.list_routes()}


@own_network
def test_a_link_can_be_changed_renamed_and_deleted() -> None:
    links.create_veth("one", "two")
    links.set_mtu("one", 1300)
    links.set_mac("one", "02:00:00:00:00:77")
    links.rename("one", "three")
    links.set_up("three")
    links.set_down("three")
    found = links.find("three")
    assert (found.mtu, found.mac, found.up) == (1300, "02:00:00:00:00:77", False)
    links.delete("three")
    with pytest.raises(NetlinkError) as caught:
        links.find("two")  # went with its peer
    assert caught.value.errno == errno.ENODEV and caught.value.filename == "two"


@own_network
def test_routes_and_addresses_can_be_taken_away() -> None:
    links.create_bridge("br9")
    links.add_address("br9", "10.9.0.1/24")
    links.add_route("10.50.0.0/16", "br9", gateway="10.9.0.7")
    links.delete_route("10.50.0.0/16", "br9", gateway="10.9.0.7")
    links.delete_address("br9", "10.9.0.1/24")
    assert not links.list_routes() and not links.list_addresses("br9")


@own_network
def test_a_refusal_says_call_object_and_the_kernels_words() -> None:
    links.create_bridge("br9")
    with pytest.raises(NetlinkError, match=r"RTM_NEWLINK br9: File exists \(errno 17\)"):
        links.create_bridge("br9")
    with pytest.raises(NetlinkError, match=r"RTM_NEWROUTE default via 10\.9\.9\.9: Network is unreachable .*gateway"):
        links.add_route("default", "br9", gateway="10.9.9.9")
    assert len([link for link in links.list_links() if link.kind == "bridge"]) == 1


@own_network
def test_a_veth_that_cannot_be_finished_is_not_left() -> None:
    with pytest.raises(NetlinkError):
        links.create_veth("one", "two", alias="x" * 300)
    assert [link.name for link in links.list_links() if link.kind == "veth"] == []


@own_network
def test_a_peer_is_born_in_the_other_namespace_and_lo_can_be_set_up_there() -> None:
    with namespaces(1) as (pod,):
        links.create_veth("host0", "eth0", peer_netns_fd=pod.fd, peer_mac="02:00:00:00:00:05")
        with NetlinkSocket(pod.fd) as inside:
            links.lo_up(on=inside)
            assert {link.name for link in links.list_links(on=inside) if link.up} == {"lo"}
            assert links.find("eth0", on=inside).mac == "02:00:00:00:00:05"
        assert "127.0.0.1/8" in pod.run("ip", "address", "show", "lo")
        assert "eth0" not in {link.name for link in links.list_links()}


@own_network
def test_a_tap_moves_to_another_namespace_with_its_wire() -> None:
    with namespaces(1) as (pod,):
        fd = tap.open_tap("tap0")  # after the namespace's holder was forked, else it would hold the wire too
        links.move("tap0", pod.fd, new_name="tap7")
        with NetlinkSocket(pod.fd) as inside:
            links.set_up("tap7", on=inside)
        with pod.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind(("tap7", 0x88B5))
            sender.send(b"\xff" * 6 + GUEST_MAC + b"\x88\xb5" + b"hello" * 10)
        assert b"hello" in frame(fd, lambda data: data[12:14] == b"\x88\xb5")
        os.close(fd)
        assert "tap7" not in pod.run("ip", "link")


@own_network
def test_a_taps_name_that_is_taken_or_too_long_is_refused() -> None:
    fd = tap.open_tap("tap0")
    with pytest.raises(OSError, match=r"ioctl\(TUNSETIFF\).* tap0: "):
        tap.open_tap("tap0")
    with pytest.raises(ValueError, match="15 bytes"):
        tap.open_tap("a-name-much-too-long")
    os.close(fd)


def frame(fd: int, wanted: object, header: int = 10) -> bytes:
    """The next frame from a tap with vnet_hdr for which `wanted` is true, header taken off."""
    for _ in range(50):
        ready, _w, _x = select.select([fd], [], [], 3)
        assert ready, "no frame came out of the tap"
        data = os.read(fd, 70000)[header:]
        if wanted(data):  # type: ignore[operator]
            return data
    raise AssertionError("fifty other frames")


class Guest:
    """A machine behind a tap: answers ARP and UDP by hand, as a VM's driver would, through the redirect."""

    def __init__(self, fd: int, address: str) -> None:
        self.fd, self.address = fd, socket.inet_aton(address)

    def send(self, data: bytes, *, partial: int = 0) -> None:
        """`partial`: the checksum at the end of a UDP header starting there is left to the host (VIRTIO_NET_HDR_F_NEEDS_CSUM)."""
        header = struct.pack("=BBHHHH", 1, 0, 0, 0, partial, 6) if partial else bytes(10)
        os.write(self.fd, header + data)

    def answer_arp(self) -> None:
        request = frame(self.fd, lambda data: data[12:14] == b"\x08\x06" and data[38:42] == self.address)
        peer, peer_address = request[22:28], request[28:32]
        body = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 2, GUEST_MAC, self.address, peer, peer_address)
        self.send(peer + GUEST_MAC + b"\x08\x06" + body)

    def receive_udp(self) -> bytes:
        return frame(self.fd, lambda data: data[12:14] == b"\x08\x00" and data[23] == 17)


def behind_redirect(pod: Namespace) -> Guest:
    """eth0 of the pod, bridged here at 10.9.0.1/24, joined to a tap that the test holds."""
    bridge = links.create_bridge("br9")
    links.add_address("br9", "10.9.0.1/24")
    links.create_veth("host0", "eth0", peer_netns_fd=pod.fd, master=bridge.index, peer_mac=GUEST_MAC.hex(":"), up=True)
    fd = tap.open_tap("tap0")
    links.move("tap0", pod.fd)
    links.redirect(pod.fd, "eth0", "tap0")
    return Guest(fd, "10.9.0.5")


@own_network
def test_a_guest_behind_a_redirected_tap_talks_with_the_host_both_ways() -> None:
    with namespaces(1) as (pod,):
        guest = behind_redirect(pod)
        with host_socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("10.9.0.5", 7777))
            client.send(b"a question")
            guest.answer_arp()
            question = guest.receive_udp()
            assert question[42:] == b"a question"
            assert checksum(pseudo(question) + question[34:]) == 0, "a tap without offloads gets whole checksums"
            ports = struct.unpack("!HH", question[34:38])
            reply = struct.pack("!HHHH", ports[1], ports[0], 8 + 9, 0) + b"an answer"
            guest.send(question[6:12] + GUEST_MAC + b"\x08\x00" + ipv4(question[30:34], question[26:30], 17, reply))
            assert client.recv(100) == b"an answer"
        os.close(guest.fd)


def pseudo(data: bytes) -> bytes:
    return data[26:34] + struct.pack("!BBH", 0, 17, len(data) - 34)


@own_network
def test_a_guests_partial_checksum_is_carried_by_the_vnet_header() -> None:
    with namespaces(1) as (pod,):
        guest = behind_redirect(pod)
        with host_socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.9.0.1", 5555))
            mac = bytes.fromhex(links.find("br9").mac.replace(":", ""))
            payload = b"offloaded"
            source, target = socket.inet_aton("10.9.0.5"), socket.inet_aton("10.9.0.1")
            seed = ~checksum(source + target + struct.pack("!BBH", 0, 17, 8 + len(payload))) & 0xFFFF
            udp = struct.pack("!HHHH", 4444, 5555, 8 + len(payload), seed) + payload
            guest.send(mac + GUEST_MAC + b"\x08\x00" + ipv4(source, target, 17, udp), partial=34)
            data, peer = server.recvfrom(100)
            assert (data, peer) == (b"offloaded", ("10.9.0.5", 4444))
        os.close(guest.fd)


@own_network
def test_a_redirected_link_hides_its_frames_from_the_pods_own_stack() -> None:
    with namespaces(1) as (pod,):
        guest = behind_redirect(pod)
        with NetlinkSocket(pod.fd) as inside:
            links.add_address("eth0", "10.9.0.5/24", on=inside)
        with host_socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("10.9.0.5", 9))
            client.send(b"x")
            request = frame(guest.fd, lambda data: data[12:14] == b"\x08\x06")
            assert request[38:42] == guest.address  # it reached the guest
        assert "10.9.0.5" not in [line.split()[0] for line in output("ip", "neigh").splitlines() if "lladdr" in line]
        os.close(guest.fd)


@own_network
def test_a_redirect_to_a_link_that_is_not_there_says_which() -> None:
    with namespaces(1) as (pod,), pytest.raises(NetlinkError, match="RTM_GETLINK tap9: No such device"):
        links.redirect(pod.fd, "lo", "tap9")
