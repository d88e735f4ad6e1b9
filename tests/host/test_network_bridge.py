"""The built-in network: pods on a bridge, with real packets, in a network namespace that stands for the host."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from network_support import Namespace, ask, host_socket, ipv4, namespaces, output, own_network, tcp_server

from nacre.config import Config
from nacre.linux import links, nftables
from nacre.linux.netlink import NetlinkError, NetlinkSocket
from nacre.network import HostPortTaken, Network, NetworkFailure, NetworkNotReady, PodNetwork, PortMapping, findings
from nacre.network.builtin import link_name
from nacre.network.types import RangeFull, RangeTaken

TCP = (socket.AF_INET, socket.SOCK_STREAM)


def config(tmp_path: Path, **settings: str) -> Config:
    return Config(prefix=str(tmp_path), pod_cidr=settings.get("pod_cidr", "auto"), node_name="test")


@contextmanager
def network(settings: Config) -> Iterator[Network]:
    """A started network; at the end nothing of it may be left."""
    made = Network(settings)
    made.start()
    try:
        yield made
    finally:
        made.stop()
    assert settings.bridge not in {link.name for link in links.list_links()}
    assert not [link.name for link in links.list_links() if link.name.startswith("nv")]
    assert ("ip", settings.instance) not in nftables.list_tables()
    assert not os.listdir(f"{settings.data}/network/leases")


def address(attachment: object) -> str:
    return str(attachment.addresses[0].partition("/")[0])  # type: ignore[attr-defined]


def pod(name: str, *ports: PortMapping) -> PodNetwork:
    return PodNetwork(sandbox_id=f"sandbox-{name}", name=name, namespace="default", ports=ports)


@contextmanager
def outside(address_here: str = "198.51.100.1") -> Iterator[Namespace]:
    """Another machine, 198.51.100.9, reached by a link of the "host"; it knows no way to the pods."""
    with namespaces(1) as (machine,):
        links.create_veth("up0", "eth0", peer_netns_fd=machine.fd, up=True)
        links.add_address("up0", f"{address_here}/24")
        with NetlinkSocket(machine.fd) as there:
            links.lo_up(on=there)
            links.add_address("eth0", "198.51.100.9/24", on=there)
            links.set_up("eth0", on=there)
        yield machine


@own_network
def test_a_pod_has_eth0_with_address_route_and_a_mac_that_follows_from_the_address(tmp_path: Path) -> None:
    with network(config(tmp_path, pod_cidr="10.66.0.0/16")) as node, namespaces(1) as (space,):
        got = node.attach(pod("web"), space.path)
        assert (got.addresses, got.gateway, got.mac) == (["10.66.0.2/16"], "10.66.0.1", "0e:6e:0a:42:00:02")
        assert got.routes == [("0.0.0.0/0", "10.66.0.1")]
        shown = space.run("ip", "address", "show", "eth0")
        assert "10.66.0.2/16" in shown and got.mac in shown and "inet6" not in shown
        assert space.run("ip", "route").startswith("default via 10.66.0.1 dev eth0")
        assert "127.0.0.1/8" in space.run("ip", "address", "show", "lo")
        assert "default/web" in output("ip", "link", "show", link_name("sandbox-web"))


@own_network
def test_pods_reach_each_other_the_host_and_the_world(tmp_path: Path) -> None:
    with outside() as machine, network(config(tmp_path)) as node, namespaces(2) as (one, two):
        first, second = node.attach(pod("one"), one.path), node.attach(pod("two"), two.path)
        for server, name in ((two.socket(*TCP), address(second)), (host_socket(*TCP), node.gateway)):
            thread = tcp_server(server, name, 80)
            assert ask(one.socket(*TCP), name, 80) == address(first)
            thread.join()
        thread = tcp_server(machine.socket(*TCP), "198.51.100.9", 80)
        assert ask(one.socket(*TCP), "198.51.100.9", 80) == "198.51.100.1", "masqueraded as the host"
        thread.join()
        thread = tcp_server(one.socket(*TCP), address(first), 81)
        assert ask(host_socket(*TCP), address(first), 81) == node.gateway
        thread.join()


@own_network
def test_a_host_port_is_reached_from_everywhere_and_gone_after_detach(tmp_path: Path) -> None:
    with outside() as machine, network(config(tmp_path)) as node, namespaces(2) as (one, two):
        got = node.attach(pod("web", PortMapping(container_port=80, host_port=8080)), one.path)
        other = node.attach(pod("client"), two.path)
        thread = tcp_server(one.socket(*TCP), "0.0.0.0", 80, count=6)
        assert ask(machine.socket(*TCP), "198.51.100.1", 8080) == "198.51.100.9", "the client's address is seen"
        assert ask(host_socket(*TCP), "198.51.100.1", 8080) == "198.51.100.1"
        assert ask(host_socket(*TCP), "127.0.0.1", 8080) == node.gateway
        assert ask(two.socket(*TCP), "198.51.100.1", 8080) == node.gateway
        assert ask(one.socket(*TCP), "198.51.100.1", 8080) == node.gateway, "a pod reaches itself (hairpin)"
        assert ask(two.socket(*TCP), address(got), 80) == address(other)
        thread.join()
        node.detach("sandbox-web")
        with pytest.raises(OSError) as caught:
            ask(host_socket(*TCP), "127.0.0.1", 8080)
        assert caught.value.errno == errno.ECONNREFUSED


@own_network
def test_a_udp_port_of_one_host_address_is_forwarded_there_only(tmp_path: Path) -> None:
    port = PortMapping(container_port=53, host_port=5353, protocol="UDP", host_ip="198.51.100.1")
    with outside() as machine, network(config(tmp_path)) as node, namespaces(1) as (one,):
        node.attach(pod("dns", port), one.path)
        with one.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, machine.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            server.bind(("0.0.0.0", 53))
            client.sendto(b"who", ("198.51.100.1", 5353))
            assert server.recvfrom(10)[0] == b"who"
        with host_socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
            local.connect(("127.0.0.1", 5353))
            local.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                local.recv(10)


@own_network
def test_a_pod_cannot_reach_the_hosts_loopback(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with network(settings) as node, namespaces(1) as (one,), host_socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        got = node.attach(pod("one"), one.path)
        server.bind(("127.0.0.1", 9999))
        server.settimeout(0.3)
        datagram = struct.pack("!HHHH", 1234, 9999, 12, 0) + b"evil"
        packet = ipv4(socket.inet_aton(address(got)), socket.inet_aton("127.0.0.1"), 17, datagram)
        mac = bytes.fromhex(links.find(settings.bridge).mac.replace(":", ""))
        with one.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind(("eth0", 0x0800))
            sender.send(mac + bytes.fromhex(got.mac.replace(":", "")) + b"\x08\x00" + packet)
            with pytest.raises(TimeoutError):
                server.recv(10)
            output("nft", "flush", "chain", "ip", settings.instance, "guard")
            sender.send(mac + bytes.fromhex(got.mac.replace(":", "")) + b"\x08\x00" + packet)
            assert server.recv(10) == b"evil", "it is the guard that holds, nothing else"


@own_network
def test_a_host_port_of_another_pod_or_process_is_refused_by_name_and_nothing_stays(tmp_path: Path) -> None:
    with network(config(tmp_path)) as node, namespaces(2) as (one, two), host_socket(*TCP) as server:
        node.attach(pod("first", PortMapping(container_port=80, host_port=8080)), one.path)
        with pytest.raises(
            HostPortTaken, match=r"127\.0\.0\.1:8080/tcp to pod default/second: it is forwarded to pod default/first"
        ):
            node.attach(pod("second", PortMapping(container_port=81, host_port=8080, host_ip="127.0.0.1")), two.path)
        server.bind(("127.0.0.1", 7070))
        server.listen()
        with pytest.raises(HostPortTaken, match="a process of this host has it"):
            node.attach(pod("third", PortMapping(container_port=81, host_port=7070)), two.path)
        assert "eth0" not in two.run("ip", "link")
        node.detach("sandbox-first")
        node.attach(pod("second", PortMapping(container_port=81, host_port=8080)), two.path)  # free at once


@own_network
def test_a_failure_midway_takes_everything_back(tmp_path: Path) -> None:
    with network(config(tmp_path)) as node, namespaces(1) as (one,):
        with NetlinkSocket(one.fd) as inside:
            links.create_bridge("eth0", on=inside)  # in the way
        with pytest.raises(NetworkFailure, match=r"connect pod default/web to the network: RTM_NEWLINK .*File exists"):
            node.attach(pod("web", PortMapping(container_port=80, host_port=8080)), one.path)
        with pytest.raises(NetworkFailure, match="No such file or directory"):
            node.attach(pod("web"), "/nowhere/netns")
        assert [link.name for link in links.list_links() if link.kind == "veth"] == []
        assert not nftables.list_elements("ip", config(tmp_path).instance, "host_ports")
        assert not os.listdir(f"{config(tmp_path).data}/network/leases")


@own_network
def test_a_rule_that_is_refused_takes_link_and_address_back(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with network(settings) as node, namespaces(1) as (one,):
        nftables.delete_table("ip", settings.instance)
        with pytest.raises(NetworkFailure, match=r"NFT_MSG_NEWSETELEM ip \S+ host_ports: No such file"):
            node.attach(pod("web", PortMapping(container_port=80, host_port=8080)), one.path)
        assert "eth0" not in one.run("ip", "link")
        assert not os.listdir(f"{settings.data}/network/leases")


@own_network
def test_detach_works_twice_and_after_the_namespace_is_gone(tmp_path: Path) -> None:
    with network(config(tmp_path)) as node, namespaces(1) as (one,):
        node.attach(pod("web", PortMapping(container_port=80, host_port=8080)), one.path)
        one.end()
        for _ in range(2):
            node.detach("sandbox-web")
            node.settle()
        node.detach("never attached")
        node.settle()
        assert [link.name for link in links.list_links() if link.kind == "veth"] == []


@own_network
def test_a_sandbox_attached_twice_is_attached_once(tmp_path: Path) -> None:
    with network(config(tmp_path)) as node, namespaces(2) as (one, two):
        node.attach(pod("web", PortMapping(container_port=80, host_port=8080)), one.path)
        node.attach(pod("web", PortMapping(container_port=80, host_port=8080)), two.path)
        assert "eth0" not in one.run("ip", "link") and "eth0" in two.run("ip", "link")
        assert len(os.listdir(f"{config(tmp_path).data}/network/leases")) == 1


@own_network
def test_attaching_and_detaching_in_parallel_gives_every_pod_its_own_address(tmp_path: Path) -> None:
    with network(config(tmp_path)) as node, namespaces(16) as spaces:
        seen: list[str] = []

        def churn(worker: int) -> None:
            for number in range(worker, 16, 4):
                port = PortMapping(container_port=80, host_port=9000 + number)
                seen.append(address(node.attach(pod(f"p{number}", port), spaces[number].path)))
                if number % 2:
                    node.detach(f"sandbox-p{number}")

        threads = [threading.Thread(target=churn, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        node.settle()
        assert len(seen) == len(set(seen)) == 16
        assert len([link for link in links.list_links() if link.kind == "veth"]) == 8
        assert len(nftables.list_elements("ip", config(tmp_path).instance, "host_ports")) == 8


@own_network
def test_after_a_killed_daemon_pods_go_on_and_what_is_dead_is_collected(tmp_path: Path) -> None:
    settings = config(tmp_path)
    former = Network(settings)
    former.start()
    with namespaces(3) as (one, two, three):
        got = former.attach(pod("alive", PortMapping(container_port=80, host_port=8080)), one.path)
        former.attach(pod("dead", PortMapping(container_port=80, host_port=8081)), two.path)
        former.close()  # all that a kill does not do: the thread ends, nothing is taken away
        with network(settings) as node:
            thread = tcp_server(one.socket(*TCP), address(got), 80)
            assert ask(host_socket(*TCP), "127.0.0.1", 8080) == node.gateway
            thread.join()
            node.collect({"sandbox-alive"})
            assert "eth0" in one.run("ip", "link") and "eth0" not in two.run("ip", "link")
            assert os.listdir(f"{settings.data}/network/leases") == [address(got)]
            assert len(nftables.list_elements("ip", settings.instance, "host_ports")) == 1
            node.attach(pod("new"), three.path)
            node.collect({"sandbox-alive"})
            assert "eth0" in three.run("ip", "link"), "an attachment just made is not collected"


@own_network
def test_forwarding_is_on_while_the_node_is_up_and_then_what_it_was(tmp_path: Path) -> None:
    path = "/proc/sys/net/ipv4/ip_forward"
    one, two = config(tmp_path / "one"), config(tmp_path / "two")
    first, second = Network(one), Network(two)
    first.start()
    second.start()
    assert Path(path).read_text() == "1\n"
    assert first.cidr != second.cidr and first.cidr.startswith("10.119.")
    assert first.stop() == [f"net.ipv4.ip_forward stays 1 for the node of {two.bridge}, which restores it"]
    assert Path(path).read_text() == "1\n", "the other node still needs it"
    assert Network(two).stop() == []  # as `nacre down` does after a kill: another process, nothing started
    assert Path(path).read_text() == "0\n"


@own_network
def test_forwarding_that_somebody_else_came_to_rely_on_stays_on(tmp_path: Path) -> None:
    node = Network(config(tmp_path))
    node.start()
    links.create_bridge("docker0")
    assert node.stop() == ["net.ipv4.ip_forward stays 1: docker0 came while it was on and may need it"]
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"


@own_network
def test_forwarding_that_was_on_before_stays_on(tmp_path: Path) -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    with network(config(tmp_path)):
        pass
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"


@own_network
def test_nodes_that_start_at_the_same_time_get_ranges_of_their_own(tmp_path: Path) -> None:
    nodes = [Network(config(tmp_path / str(number))) for number in range(6)]
    threads = [threading.Thread(target=node.start) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({node.cidr for node in nodes}) == 6
    for node in nodes:
        node.stop()
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "0\n"


@own_network
def test_an_automatic_range_avoids_what_the_host_routes(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with network(settings) as node:
        wanted = node.cidr
    links.create_bridge("docker0")
    links.add_address("docker0", wanted.replace(".0/24", ".1/24"))
    with network(settings) as node:
        assert node.cidr != wanted


@own_network
@pytest.mark.parametrize("up", [True, False])
def test_a_range_that_somebody_holds_is_refused_naming_the_holder(tmp_path: Path, up: bool) -> None:
    links.create_bridge("docker0", up=up)
    links.add_address("docker0", "10.66.3.1/24")
    settings = config(tmp_path, pod_cidr="10.66.0.0/16")
    with pytest.raises(RangeTaken, match=r"use 10\.66\.0\.0/16 for pods: it overlaps the .* docker0") as caught:
        Network(settings).start()
    assert "pod_cidr" in caught.value.remedy
    assert settings.bridge not in {link.name for link in links.list_links()}
    (found,) = [finding for finding in findings(settings) if "overlaps" in finding["what"]]
    assert found["level"] == "bad" and "docker0" in found["what"]


@own_network
def test_a_bridge_left_over_with_another_range_gets_the_new_one_unless_pods_use_it(tmp_path: Path) -> None:
    old, new = config(tmp_path, pod_cidr="10.66.0.0/16"), config(tmp_path, pod_cidr="10.67.0.0/16")
    former = Network(old)
    former.start()
    with namespaces(1) as (one,):
        former.attach(pod("web"), one.path)
        former.close()
        with pytest.raises(RangeTaken, match=r"has another range .* and 1 links plugged in"):
            Network(new).start()
    former.start()
    former.collect(set())
    former.close()
    with network(new):
        assert [found.address for found in links.list_addresses(new.bridge)] == ["10.67.0.1/16"]


@own_network
def test_a_full_range_says_so_and_a_detach_makes_room(tmp_path: Path) -> None:
    with network(config(tmp_path, pod_cidr="10.66.0.0/30")) as node, namespaces(2) as (one, two):
        node.attach(pod("one"), one.path)
        with pytest.raises(RangeFull, match=r"all 1 addresses of 10.66.0.0/30 are leased"):
            node.attach(pod("two"), two.path)
        node.detach("sandbox-one")
        node.settle()
        node.attach(pod("two"), two.path)


@own_network
def test_a_link_of_the_bridges_name_is_not_touched(tmp_path: Path) -> None:
    settings = config(tmp_path)
    links.create_veth(settings.bridge, "other")
    with pytest.raises(NetworkFailure, match="a link of that name already, a veth"):
        Network(settings).start()
    assert Network(settings).stop() == [] and links.find(settings.bridge).kind == "veth"


@own_network
def test_a_network_that_is_not_started_says_so(tmp_path: Path) -> None:
    node = Network(config(tmp_path))
    assert not node.status().ready
    with pytest.raises(NetworkNotReady):
        node.attach(pod("web"), "/proc/self/ns/net")


@own_network
def test_a_forward_policy_of_drop_is_found_until_a_rule_accepts_the_bridge(tmp_path: Path) -> None:
    settings = config(tmp_path)
    output("nft", "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    (found,) = [finding for finding in findings(settings) if "FORWARD" in finding["what"]]
    assert found["level"] == "warn" and f"-i {settings.bridge} -j ACCEPT" in found["remedy"]
    for command in found["remedy"].split("; "):
        output("nft", "insert", "rule", "ip", "filter", "FORWARD", *_as_nft(command.split()))
    assert not [finding for finding in findings(settings) if "FORWARD" in finding["what"]]


def _as_nft(words: list[str]) -> list[str]:
    return ["iifname" if "-i" in words else "oifname", words[-3], "accept"]


@own_network
def test_the_remedy_for_a_drop_policy_lets_pods_out(tmp_path: Path) -> None:
    settings = config(tmp_path)
    output("nft", "add table inet fw; add chain inet fw passing { type filter hook forward priority 0; policy drop; }")
    with outside() as machine, network(settings) as node, namespaces(1) as (one,):
        node.attach(pod("one"), one.path)
        with one.socket(*TCP) as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(("198.51.100.9", 80))
        (found,) = [finding for finding in findings(settings) if "policy drop" in finding["what"]]
        for command in found["remedy"].split("; "):
            output(*command.split())
        thread = tcp_server(machine.socket(*TCP), "198.51.100.9", 80)
        assert ask(one.socket(*TCP), "198.51.100.9", 80) == "198.51.100.1"
        thread.join()


@own_network
def test_a_pods_mtu_is_that_of_the_way_out(tmp_path: Path) -> None:
    with outside() as _machine:
        links.set_mtu("up0", 1380)
        links.add_route("default", "up0", gateway="198.51.100.9")
        with network(config(tmp_path)) as node, namespaces(1) as (one,):
            assert node.attach(pod("one"), one.path).mtu == 1380
            assert "mtu 1380" in one.run("ip", "link", "show", "eth0")


@own_network
def test_a_missing_bridge_is_an_error_with_its_name() -> None:
    with pytest.raises(NetlinkError, match="RTM_GETLINK nacre0: No such device"):
        links.find("nacre0")
