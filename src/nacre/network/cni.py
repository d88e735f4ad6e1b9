"""Pods attached by a chain of CNI plugins (CNI specification 1.0.0, section 3): somebody else's network under nacre's joint.

    DATA/network/cni/SANDBOX.json    what was asked (list, netns, runtime arguments) and the last result, written before the first plugin runs

DEL and CHECK are given exactly that, whatever the configuration says by then. A kill in the middle of ADD leaves the file without a
result; `collect` runs DEL with it. The loopback link is set up here: no loopback plugin is needed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import asdict, replace
from typing import Any

from nacre.config import Config
from nacre.linux import links
from nacre.linux.libc import owned
from nacre.linux.netlink import NetlinkError, NetlinkSocket
from nacre.network import cni_plugins
from nacre.network.cni_plugins import NetworkList
from nacre.network.types import INTERFACE, Attachment, NetworkFailure, NetworkStatus, PodNetwork, PortMapping
from nacre.oci.errors import Failure

_log = logging.getLogger(__name__)

PLUGIN_DEADLINE_S = 40.0  # a kubelet waits two minutes for a sandbox: ours must end, and undo, before that
CHAIN_DEADLINE_S = 80.0


class CniNetwork:
    """The chain in config.cni_dir. All methods block and may be called from several threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._directory = f"{config.data}/network/cni"
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    cidr = ""
    gateway = ""

    def start(self) -> None:
        """Nothing to make. That no configuration is there yet is a status, not a failure: networks are often installed as pods."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Nothing is held open."""

    def settle(self) -> None:
        """A detached pod is gone when `detach` returns."""

    def stop(self) -> list[str]:
        """DEL for every pod still recorded; sentences about those that refused."""
        refused = []
        for sandbox_id in self._recorded():
            try:
                self.detach(sandbox_id)
            except Failure as failure:
                refused.append(failure.sentence())
        return refused

    def status(self) -> NetworkStatus:
        try:
            network = cni_plugins.load(self._config.cni_dir)
            for plugin in network.plugins:
                cni_plugins.find_plugin(plugin["type"], self._config.cni_bin_dirs)
        except Failure as failure:
            return NetworkStatus(ready=False, reason=failure.code, message=failure.sentence())
        except OSError as error:
            return NetworkStatus(ready=False, reason="NetworkNotReady", message=f"{self._config.cni_dir}: {error.strerror}")
        return NetworkStatus(ready=True)

    def attach(self, pod: PodNetwork, netns: str) -> Attachment:
        """ADD through the whole chain; a failure runs DEL through it again. Raises NetworkNotReady, PluginFailed, NetworkFailure."""
        network = cni_plugins.load(self._config.cni_dir)
        paths = [cni_plugins.find_plugin(plugin["type"], self._config.cni_bin_dirs) for plugin in network.plugins]
        _loopback(netns)
        record = _record(pod, netns, network)
        with self._exclusively(pod.sandbox_id):
            if (former := self._load(pod.sandbox_id)) is not None:
                self._delete(former)
            self._save(pod.sandbox_id, record)
            end = time.monotonic() + CHAIN_DEADLINE_S
            result: dict[str, Any] = {}
            try:
                for path, plugin in zip(paths, network.plugins, strict=True):
                    result = self._run(path, "ADD", plugin, record, result, end) or result
                attachment = _measured(attachment_of(result, pod), netns)
            except Failure as failure:
                self._undo(pod.sandbox_id, record, failure)
                raise
            self._save(pod.sandbox_id, record | {"result": result})
            return attachment

    def _undo(self, sandbox_id: str, record: dict[str, Any], failure: Failure) -> None:
        """The first failure is what the user reads; that taking back failed too is added to its evidence."""
        try:
            self._delete(record)
            self._forget(sandbox_id)
        except Failure as second:
            failure.evidence = (*failure.evidence, f"taking it back: {second}")

    def detach(self, sandbox_id: str) -> None:
        """DEL in reverse order with the recorded result; a pod that has no record is fine. Raises PluginFailed; the record then stays."""
        with self._exclusively(sandbox_id):
            record = self._load(sandbox_id)
            if record is not None:
                self._delete(record)
                self._forget(sandbox_id)

    def check(self, sandbox_id: str) -> None:
        """CHECK through the chain, unless its configuration says disableCheck or is older than 0.4.0. Raises PluginFailed."""
        record = self._load(sandbox_id)
        if record is None or record["disable_check"] or record["version"] < "0.4.0":
            return
        end = time.monotonic() + CHAIN_DEADLINE_S
        for plugin in record["plugins"]:
            path = cni_plugins.find_plugin(plugin["type"], self._config.cni_bin_dirs)
            self._run(path, "CHECK", plugin, record, record.get("result", {}), end)

    def collect(self, live: set[str]) -> None:
        """DEL for every recorded sandbox that does not live; one that refuses is tried again next time."""
        for sandbox_id in self._recorded():
            if sandbox_id in live or sandbox_id in self._busy:
                continue
            try:
                self.detach(sandbox_id)
            except Failure as failure:
                _log.warning("%s", failure.sentence())

    def _delete(self, record: dict[str, Any]) -> None:
        end = time.monotonic() + CHAIN_DEADLINE_S
        gone = (
            record if os.path.exists(record["netns"]) else record | {"netns": ""}
        )  # the specification allows DEL without a namespace
        for plugin in reversed(record["plugins"]):
            path = cni_plugins.find_plugin(plugin["type"], self._config.cni_bin_dirs)
            self._run(path, "DEL", plugin, gone, record.get("result", {}), end)

    def _run(
        self, path: str, command: str, plugin: dict[str, Any], record: dict[str, Any], previous: dict[str, Any], end_s: float
    ) -> dict[str, Any]:
        stdin = {key: value for key, value in plugin.items() if key != "capabilities"}
        stdin |= {"cniVersion": record["version"], "name": record["name"]}
        wanted = {
            name: record["runtime"][name]
            for name, on in plugin.get("capabilities", {}).items()
            if on and name in record["runtime"]
        }
        if wanted:
            stdin["runtimeConfig"] = wanted
        if previous and (command != "DEL" or record["version"] >= "0.4.0"):
            stdin["prevResult"] = previous
        environment = {
            "CNI_CONTAINERID": record["sandbox"],
            "CNI_NETNS": record["netns"],
            "CNI_IFNAME": INTERFACE,
            "CNI_ARGS": record["arguments"],
            "CNI_PATH": ":".join(self._config.cni_bin_dirs),
        }
        left = min(PLUGIN_DEADLINE_S, end_s - time.monotonic())
        return cni_plugins.invoke(path, command, stdin, environment, left)

    # Records

    def _path(self, sandbox_id: str) -> str:
        return f"{self._directory}/{os.path.basename(sandbox_id)}.json"

    def _save(self, sandbox_id: str, record: dict[str, Any]) -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        aside = f"{self._directory}/.{os.path.basename(sandbox_id)}"
        with open(aside, "w") as file:
            json.dump(record, file)
        os.rename(aside, self._path(sandbox_id))

    def _load(self, sandbox_id: str) -> dict[str, Any] | None:
        try:
            with open(self._path(sandbox_id), "rb") as file:
                record: dict[str, Any] = json.load(file)
                return record
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise NetworkFailure(
                what=f"read what CNI plugins did for sandbox {sandbox_id[:12]}",
                cause=f"{self._path(sandbox_id)}: {error}",
                remedy="after a power cut its pod is gone: remove the file",
            ) from error

    def _forget(self, sandbox_id: str) -> None:
        os.unlink(self._path(sandbox_id))

    def _recorded(self) -> list[str]:
        if not os.path.isdir(self._directory):
            return []
        return [name.removesuffix(".json") for name in os.listdir(self._directory) if name.endswith(".json")]

    def _exclusively(self, sandbox_id: str) -> _Busy:
        return _Busy(self._busy, self._lock, sandbox_id)


class _Busy:
    """One act at a time for a sandbox; a second one fails at once, naming the first, instead of waiting behind it."""

    def __init__(self, busy: set[str], lock: threading.Lock, sandbox_id: str) -> None:
        self._set, self._lock, self._id = busy, lock, sandbox_id

    def __enter__(self) -> None:
        with self._lock:
            if self._id in self._set:
                cause = "plugins are still at work on it for an earlier request"
                raise NetworkFailure(what=f"change the network of sandbox {self._id[:12]}", cause=cause)
            self._set.add(self._id)

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._set.discard(self._id)


def _record(pod: PodNetwork, netns: str, network: NetworkList) -> dict[str, Any]:
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": pod.namespace,
        "K8S_POD_NAME": pod.name,
        "K8S_POD_INFRA_CONTAINER_ID": pod.sandbox_id,
        "K8S_POD_UID": pod.uid,
    }
    runtime: dict[str, Any] = {}
    if ports := [_mapping(port) for port in pod.ports if port.host_port]:
        runtime["portMappings"] = ports
    return {
        "sandbox": pod.sandbox_id,
        "netns": netns,
        "path": network.path,
        "arguments": ";".join(f"{key}={value}" for key, value in arguments.items()),
        "runtime": runtime,
        **{key: value for key, value in asdict(network).items() if key in ("name", "version", "plugins", "disable_check")},
    }


def _mapping(port: PortMapping) -> dict[str, Any]:
    """An entry of the portMappings capability (CNI conventions)."""
    mapping = {"hostPort": port.host_port, "containerPort": port.container_port, "protocol": port.protocol}
    return mapping if port.any_address else mapping | {"hostIP": port.host_ip}


def _loopback(netns: str) -> None:
    try:
        with owned(os.open(netns, os.O_RDONLY | os.O_CLOEXEC)) as fd, NetlinkSocket(fd) as inside:
            links.lo_up(on=inside)
    except OSError as error:
        said = str(error) if isinstance(error, NetlinkError) else f"{netns}: {error.strerror} (errno {error.errno})"
        raise NetworkFailure(what="set up the pod's loopback link", cause=said) from error


def _measured(attachment: Attachment, netns: str) -> Attachment:
    """With MAC and MTU as they are: results before CNI 1.1 do not tell the MTU, and a VM needs both."""
    try:
        with owned(os.open(netns, os.O_RDONLY | os.O_CLOEXEC)) as fd, NetlinkSocket(fd) as inside:
            link = links.find(INTERFACE, on=inside)
    except OSError as error:
        raise NetworkFailure(what=f"look at the pod's {INTERFACE} after the CNI plugins", cause=str(error)) from error
    return replace(attachment, mac=link.mac, mtu=link.mtu)


def attachment_of(result: dict[str, Any], pod: PodNetwork) -> Attachment:
    """The pod's view of a result (section 5, "Success"). Raises NetworkFailure when it names no address for the pod."""
    try:
        interfaces = result.get("interfaces", [])
        ours = [index for index, found in enumerate(interfaces) if found.get("name") == INTERFACE and found.get("sandbox")]
        addresses = [ip for ip in result.get("ips", []) if not interfaces or ip.get("interface", -1) in ours]
        routes = [(route["dst"], route.get("gw", "")) for route in result.get("routes", [])]
        gateway = next((ip["gateway"] for ip in addresses if ip.get("gateway")), "")
        dns = result.get("dns", {})
        lines = [f"nameserver {server}" for server in dns.get("nameservers", [])]
        lines += [f"search {' '.join(dns['search'])}"] if lines and dns.get("search") else []
        lines += [f"options {' '.join(dns['options'])}"] if lines and dns.get("options") else []
        first = interfaces[ours[0]] if ours else {}
        found = [str(ip["address"]) for ip in addresses]
    except (KeyError, TypeError, AttributeError) as error:
        raise NetworkFailure(what="read the CNI plugins' result", cause=f"{error!r}", evidence=(json.dumps(result),)) from error
    if not found:
        cause = f"it names no address for {INTERFACE} of pod {pod.title}"
        raise NetworkFailure(what="read the CNI plugins' result", cause=cause, evidence=(json.dumps(result),))
    filled = [(destination, via or (gateway if destination in ("0.0.0.0/0", "::/0") else "")) for destination, via in routes]
    return Attachment(
        mac=str(first.get("mac", "")),
        addresses=found,
        gateway=gateway,
        routes=filled,
        mtu=int(first.get("mtu", 0) or 0),
        dns=lines,
    )
