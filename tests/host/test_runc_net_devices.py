"""Links of the host that become the container's (config-linux.md "Network Devices")."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network_support import own_network
from runc_support import Bundle, made, with_user_namespace

from nacre.linux import links

MAC = "02:00:5e:10:00:01"


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def a_link(name: str = "here0", mtu: int = 1400) -> None:
    """A veth with one address of each family."""
    links.create_veth(name, f"{name}-b")
    links.set_link(name, mtu=mtu, mac=MAC)
    links.set_up(name)
    for address in ("192.0.2.7/24", "2001:db8::7/64"):
        links.add_address(name, address)


def devices(bundle: Bundle, **wanted: Any) -> Bundle:
    bundle.linux["netDevices"] = wanted
    return bundle


@own_network
def test_a_link_moves_in_with_its_addresses_and_comes_up(bundle: Bundle) -> None:
    a_link()
    told = devices(bundle, here0={"name": "inside0"}).says("ip addr show inside0; ls /sys/class/net")
    assert "inet 192.0.2.7/24 brd 192.0.2.255" in told and "inet6 2001:db8::7/64" in told
    assert MAC in told and "mtu 1400" in told and ",UP" in told
    assert told.split("\n")[-3:-1] == ["inside0", "lo"]
    assert "here0" not in [link.name for link in links.list_links()]


@own_network
def test_links_keep_their_names_or_take_one_of_a_template(bundle: Bundle) -> None:
    a_link("eth0")
    a_link("eth1")
    assert devices(bundle, eth0={"name": "net%d"}, eth1={}).says("ls /sys/class/net") == "eth1\nlo\nnet0\n"


@own_network
def test_a_link_moves_into_a_user_namespace_and_its_sysctls_are_set_there(bundle: Bundle) -> None:
    a_link()
    with_user_namespace(devices(bundle, here0={}))
    bundle.linux["sysctl"] = {"net.ipv4.conf.here0.forwarding": "1"}
    assert bundle.says("cat /proc/sys/net/ipv4/conf/here0/forwarding") == "1\n"


@own_network
def test_hooks_find_the_link_moved_already(bundle: Bundle, tmp_path: Path) -> None:
    a_link()
    script = f"pid=$(grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*$'); cat /proc/$pid/net/dev >{tmp_path}/seen"
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}]}
    devices(bundle, here0={"name": "inside0"}).says("true")
    assert "inside0:" in (tmp_path / "seen").read_text()


@own_network
def test_a_failing_create_brings_the_link_back_as_it_was(bundle: Bundle) -> None:
    a_link()
    before = links.find("here0")
    bundle.mount("/x", "no-such-filesystem", "none")
    assert "mount no-such-filesystem on /x" in devices(bundle, here0={"name": "inside0"}).refuses()
    after = links.find("here0")
    assert (after.up, after.mtu, after.mac) == (before.up, before.mtu, before.mac)
    assert {"192.0.2.7/24", "2001:db8::7/64"} <= {one.address for one in links.list_addresses("here0")}


@own_network
def test_a_link_that_cannot_move_is_told_by_name_and_stays(bundle: Bundle) -> None:
    a_link()
    assert "move the network device gone0 into the container" in devices(bundle, gone0={}).refuses()
    told = devices(bundle, here0={"name": "lo"}).refuses()
    assert "here0 into the container as lo" in told and "has a link of that name" in told
    assert "cannot leave their namespace" in devices(bundle, lo={"name": "lo2"}).refuses()
    assert links.find("here0").up


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"here0": {"name": "a/b"}}, "is no name"),
        ({"here0": {"name": "much-too-long-a-name"}}, "is no name"),
        ({"here0": {"name": "%d%d"}}, "is no name"),
        ({"here0": {"name": "x"}, "x": {}}, "a second device"),
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_is_touched(bundle: Bundle, wanted: dict[str, Any], named: str) -> None:
    told = devices(bundle, **wanted).refuses()
    assert "linux.netDevices" in told and named in told


def test_devices_without_a_network_namespace_are_refused(bundle: Bundle) -> None:
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "network"]
    assert "without a network namespace" in devices(bundle, here0={}).refuses()


def test_features_announces_it(bundle: Bundle) -> None:
    assert json.loads(bundle.ok("features"))["linux"]["netDevices"] == {"enabled": True}
