"""Chains of CNI plugins: the distribution's own, and small ones that misbehave."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from network_support import ask, host_socket, namespaces, output, own_network, tcp_server

from nacre.config import Config
from nacre.linux import links
from nacre.linux.netlink import NetlinkSocket
from nacre.network import Network, NetworkFailure, NetworkNotReady, PodNetwork, PortMapping, cni, findings
from nacre.network.types import PluginFailed

TCP = (socket.AF_INET, socket.SOCK_STREAM)
PLUGINS = ("bridge", "host-local", "portmap")
INSTALLED = ("/usr/lib/cni", "/opt/cni/bin")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with Debian's plugins: the installed ones, else the package downloaded and unpacked here."""
    for directory in INSTALLED:
        if all(os.access(f"{directory}/{name}", os.X_OK) for name in PLUGINS):
            return directory
    there = tmp_path_factory.mktemp("cni-plugins")
    try:
        subprocess.run(
            ["apt-get", "download", "containernetworking-plugins"], cwd=there, check=True, capture_output=True, timeout=60
        )
        subprocess.run(["dpkg-deb", "-x", *map(str, there.glob("*.deb")), str(there)], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"apt-get download containernetworking-plugins: {error}")
    return str(there / "usr/lib/cni")


def node(tmp_path: Path, *directories: str) -> Config:
    conf = tmp_path / "net.d"
    conf.mkdir(exist_ok=True)
    return Config(prefix=str(tmp_path / "node"), cni_dir=str(conf), cni_bin_dirs=directories, node_name="test")


def write(settings: Config, document: object, name: str = "10-test.conflist") -> None:
    Path(settings.cni_dir, name).write_text(document if isinstance(document, str) else json.dumps(document))


def plugin(directory: Path, name: str, body: str) -> None:
    """An executable plugin in Python; `command`, `conf` and `log` (a file kept beside it) are at hand."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(
        f"#!{sys.executable} -S\nimport json, os, sys, time\ncommand = os.environ['CNI_COMMAND']\nconf = json.load(sys.stdin)\n"
        f"with open({str(directory / 'log')!r}, 'a') as log:\n"
        f"    log.write(json.dumps([{name!r}, command, dict(os.environ), conf]) + '\\n')\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(directory: Path) -> list[tuple[str, str, dict[str, str], dict[str, object]]]:
    return [tuple(json.loads(line)) for line in (directory / "log").read_text().splitlines()]  # type: ignore[misc]


def chain(tmp_path: Path) -> dict[str, object]:
    return {
        "cniVersion": "1.0.0",
        "name": "test",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni9",
                "isGateway": True,
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(tmp_path / "ipam"),
                    "ranges": [[{"subnet": "10.44.0.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        ],
    }


@own_network
def test_bridge_host_local_and_portmap_connect_a_pod_and_take_it_off_again(tmp_path: Path, plugins: str) -> None:
    if not shutil.which("iptables"):
        pytest.skip("portmap needs iptables, which is not installed")
    settings = node(tmp_path, plugins)
    write(settings, chain(tmp_path))
    network = Network(settings)
    network.start()
    assert network.status().ready
    with namespaces(1) as (one,):
        ports = (PortMapping(container_port=80, host_port=8088),)
        got = network.attach(PodNetwork(sandbox_id="abc", name="web", namespace="default", ports=ports), one.path)
        assert got.addresses == ["10.44.0.2/24"] and got.gateway == "10.44.0.1" and ("0.0.0.0/0", "10.44.0.1") in got.routes
        assert got.mac in one.run("ip", "link", "show", "eth0") and got.mtu == 1500
        assert "127.0.0.1/8" in one.run("ip", "address", "show", "lo")
        thread = tcp_server(one.socket(*TCP), "10.44.0.2", 80, count=2)
        assert ask(host_socket(*TCP), "10.44.0.2", 80) == "10.44.0.1"
        links.create_bridge("dummy9")
        links.add_address("dummy9", "198.51.100.1/24")
        assert ask(host_socket(*TCP), "198.51.100.1", 8088)
        thread.join()
        network.detach("abc")
        network.detach("abc")
        assert "eth0" not in one.run("ip", "link")
    assert not [name for name in os.listdir(tmp_path / "ipam" / "test") if name.startswith("10.")], "the address is free again"
    assert "8088" not in output("nft", "list", "ruleset")
    assert not os.listdir(f"{settings.data}/network/cni")


@own_network
def test_a_pod_whose_namespace_is_gone_is_taken_off_by_collect(tmp_path: Path, plugins: str) -> None:
    settings = node(tmp_path, plugins)
    document = chain(tmp_path)
    write(settings, document | {"plugins": document["plugins"][:1]})  # type: ignore[index]
    network = Network(settings)
    network.start()
    with namespaces(1) as (one,):
        network.attach(PodNetwork(sandbox_id="abc"), one.path)
        network._part.check("abc")  # type: ignore[union-attr]
        with NetlinkSocket(one.fd) as inside:
            links.delete_address("eth0", "10.44.0.2/24", on=inside)
        with pytest.raises(PluginFailed, match="CNI plugin bridge: CHECK"):
            network._part.check("abc")  # type: ignore[union-attr]
    Path(settings.cni_dir, "10-test.conflist").unlink()  # DEL is given what ADD was given
    later = Network(settings)
    later.start()
    later.collect({"abc"})
    assert os.listdir(f"{settings.data}/network/cni") == ["abc.json"]
    later.collect(set())
    assert not os.listdir(f"{settings.data}/network/cni")
    assert not [name for name in os.listdir(tmp_path / "ipam" / "test") if name.startswith("10.")]


GOOD = """
if command == 'ADD':
    result = conf.get('prevResult') or {'cniVersion': conf['cniVersion'], 'ips': [{'address': '10.1.1.5/24', 'gateway': '10.1.1.1'}],
        'routes': [{'dst': '0.0.0.0/0'}], 'dns': {'nameservers': ['10.1.1.53'], 'search': ['pods.example']}}
    print(json.dumps(result))
"""


def make_eth0(path: str) -> None:
    subprocess.run(["nsenter", f"--net={path}", "ip", "link", "add", "eth0", "type", "bridge"], check=True)


@own_network
def test_plugins_are_told_what_the_specification_says(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    plugin(programs, "first", GOOD)
    plugin(programs, "second", GOOD)
    settings = node(tmp_path, str(programs))
    mapped = {"type": "second", "capabilities": {"portMappings": True, "bandwidth": True}}
    write(settings, {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "first", "own": 1}, mapped]})
    network = Network(settings)
    network.start()
    pod = PodNetwork(
        sandbox_id="abc",
        name="web",
        namespace="default",
        uid="u-1",
        ports=(PortMapping(container_port=80, host_port=81, protocol="UDP"),),
    )
    with namespaces(1) as (one,):
        make_eth0(one.path)
        got = network.attach(pod, one.path)
        network.detach("abc")
        assert got.dns == ["nameserver 10.1.1.53", "search pods.example"] and got.routes == [("0.0.0.0/0", "10.1.1.1")]
        seen = calls(programs)
        assert [(name, command) for name, command, _e, _c in seen] == [
            ("first", "ADD"), ("second", "ADD"), ("second", "DEL"), ("first", "DEL"),
        ]  # fmt: skip
        _name, _command, environment, conf = seen[1]
        assert (
            environment["CNI_CONTAINERID"] == "abc"
            and environment["CNI_NETNS"] == one.path
            and environment["CNI_IFNAME"] == "eth0"
        )
        assert environment["CNI_PATH"] == str(programs)
        assert "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web" in environment["CNI_ARGS"]
        assert conf["runtimeConfig"] == {"portMappings": [{"hostPort": 81, "containerPort": 80, "protocol": "udp"}]}
        assert conf["prevResult"]["ips"][0]["address"] == "10.1.1.5/24"  # type: ignore[index]
        assert "capabilities" not in conf and conf["name"] == "n" and conf["cniVersion"] == "1.0.0"
        assert seen[0][3]["own"] == 1 and "prevResult" not in seen[0][3] and "runtimeConfig" not in seen[0][3]
        assert all(conf["prevResult"] for _n, command, _e, conf in seen if command == "DEL")


@own_network
def test_a_plugins_own_words_and_stderr_are_the_failure_and_the_chain_is_taken_back(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    plugin(programs, "first", GOOD)
    plugin(
        programs,
        "second",
        "if command == 'ADD':\n    print('dialing the daemon', file=sys.stderr)\n"
        "    print(json.dumps({'code': 11, 'msg': 'open /run/flannel/subnet.env', 'details': 'no such file or directory'}))\n    sys.exit(1)",
    )
    settings = node(tmp_path, str(programs))
    write(settings, {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "first"}, {"type": "second"}]})
    network = Network(settings)
    network.start()
    with namespaces(1) as (one,), pytest.raises(PluginFailed) as caught:
        network.attach(PodNetwork(sandbox_id="abc"), one.path)
    failure = caught.value
    assert str(failure) == "CNI plugin second: ADD: open /run/flannel/subnet.env: no such file or directory"
    assert failure.evidence == ("dialing the daemon",) and "flannel" in failure.remedy
    assert [(name, command) for name, command, _e, _c in calls(programs)][2:] == [("second", "DEL"), ("first", "DEL")]
    assert not os.listdir(f"{settings.data}/network/cni")


@own_network
def test_a_plugin_that_hangs_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cni, "PLUGIN_DEADLINE_S", 0.5)
    programs = tmp_path / "bin"
    plugin(
        programs,
        "slow",
        "if command == 'ADD':\n    print('waiting for the lock', file=sys.stderr, flush=True)\n    child = os.fork()\n"
        f"    open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}} ')\n    time.sleep(600)",
    )
    settings = node(tmp_path, str(programs))
    write(settings, {"cniVersion": "1.0.0", "name": "n", "type": "slow"}, "10-slow.conf")
    network = Network(settings)
    network.start()
    with namespaces(1) as (one,), pytest.raises(PluginFailed, match=r"no answer within .* so it was killed") as caught:
        network.attach(PodNetwork(sandbox_id="abc"), one.path)
    assert "waiting for the lock" in caught.value.evidence
    for pid in (tmp_path / "pids").read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@own_network
@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("os.kill(os.getpid(), 9)", "no error message, ended by SIGKILL after"),
        ("sys.exit(3)", "no error message, exit code 3 after"),
        ("print('garbage')", "its answer is no JSON object"),
        ("print('{}')", "it names no address for eth0 of pod default/web"),
        ("print(json.dumps({'ips': [7]}))", "AttributeError"),
    ],
)
def test_every_way_a_plugin_can_end_badly_has_words(tmp_path: Path, body: str, cause: str) -> None:
    programs = tmp_path / "bin"
    plugin(programs, "bad", f"if command == 'ADD':\n    {body}")
    settings = node(tmp_path, str(programs))
    write(settings, {"cniVersion": "0.4.0", "name": "n", "plugins": [{"type": "bad"}]})
    network = Network(settings)
    network.start()
    with namespaces(1) as (one,), pytest.raises(NetworkFailure) as caught:
        network.attach(PodNetwork(sandbox_id="abc", name="web", namespace="default"), one.path)
    assert cause in caught.value.cause


@own_network
def test_a_missing_plugin_is_named_with_the_directories(tmp_path: Path) -> None:
    settings = node(tmp_path, str(tmp_path / "bin"), "/nowhere/cni")
    write(settings, {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "portmap"}]})
    network = Network(settings)
    network.start()
    with namespaces(1) as (one,), pytest.raises(PluginFailed, match="find the CNI plugin portmap") as caught:
        network.attach(PodNetwork(sandbox_id="abc"), one.path)
    assert f"{tmp_path / 'bin'}, /nowhere/cni" in caught.value.cause and "containernetworking-plugins" in caught.value.remedy
    status = network.status()
    assert not status.ready and "portmap" in status.message


def test_without_a_configuration_the_node_is_not_ready_and_says_what_it_saw(tmp_path: Path) -> None:
    settings = node(tmp_path, "/usr/lib/cni")
    network = Network(settings)
    network.start()
    (tmp_path / "net.d" / "readme.txt").write_text("")
    status = network.status()
    assert (status.ready, status.reason) == (False, "NetworkNotReady")
    assert f"in {settings.cni_dir}: it holds readme.txt" in status.message
    with pytest.raises(NetworkNotReady):
        network.attach(PodNetwork(sandbox_id="abc"), "/proc/self/ns/net")
    (found,) = [finding for finding in findings(settings) if "CNI" in finding["what"]]
    assert found["level"] == "bad"
    write(settings, {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "sh"}]})
    assert Network(Config(cni_dir=settings.cni_dir, cni_bin_dirs=("/bin",))).status().ready, "the directory is read each time"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "the top is not an object"),
        ('{"cniVersion": "1.0.0", "name": "n", "plugins": []}', "plugins is not a list with an element"),
        ('{"cniVersion": "1.0.0", "name": "n", "plugins": [{}]}', "plugins[0].type is missing"),
        ('{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "../sh"}]}', "is a path, not a name"),
        ('{"cniVersion": "1.0.0", "plugins": [{"type": "x"}]}', "name is missing"),
        ('{"cniVersion": "0.2.0", "name": "n", "type": "x"}', "cniVersion '0.2.0'"),
    ],
)
def test_a_wrong_configuration_names_file_and_element(tmp_path: Path, document: str, words: str) -> None:
    settings = node(tmp_path, "/usr/lib/cni")
    write(settings, document)
    status = Network(settings).status()
    assert not status.ready and words in status.message and "10-test.conflist" in status.message
