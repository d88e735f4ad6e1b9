"""The doctor's look at the network: the node's ports, the pods' network, proxies."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nacre.cli import node, taken
from nacre.cli.doctor.finding import Finding, Verdict
from nacre.config import Config

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


def ports(config: Config) -> Iterator[Finding]:
    """The node's two ports: free, or by whom they are held."""
    own = node.alive(config)
    for key, number in (("api_port", config.api_port), ("kubelet_port", config.kubelet_port)):
        if not number:
            continue
        holder = taken.port(config.listen, number)
        if holder and f"pid {own} " in holder.who:
            yield Finding("ports", Verdict.OK, f"{holder.what} is this node's own")
        elif holder:
            remedy = f"set {key} in {config.etc}/config.toml, or stop that process"
            yield Finding("ports", Verdict.BAD, f"{holder.what} ({key}) is held by {holder.who}", (), remedy)
        else:
            yield Finding("ports", Verdict.OK, f"{config.listen}:{number} is free")


def pods(config: Config) -> Iterator[Finding]:
    """The pods' range, forwarding, other people's chains that drop, resolvers: the network package's own findings."""
    from nacre.network import findings

    found = findings(config)
    for each in found:
        verdict = Verdict.BAD if each["level"] == "bad" else Verdict.WARN
        yield Finding("pod network", verdict, each["what"], tuple(each["evidence"]), each["remedy"])
    if not found:
        yield Finding("pod network", Verdict.OK, f"CNI from {config.cni_dir}" if config.cni_dir else _bridge(config))


def _bridge(config: Config) -> str:
    from nacre.network import ranges

    with open("/proc/sys/net/ipv4/ip_forward") as file:
        forwards = file.read().strip() == "1"
    known = "packets are forwarded" if forwards else "ip_forward is 0 now: set while the node is up, set back by nacre down"
    return f"range {ranges.choose(config)} is free, {known}"


def proxy(_config: Config) -> Iterator[Finding]:
    """A proxy in the environment is used for pulls; the pods' own range must not go through it."""
    found = {name: os.environ[name] for name in PROXIES if os.environ.get(name)}
    if not found:
        return
    shown = tuple(f"{name}={_without_password(value)}" for name, value in found.items())
    exempt = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    if "127.0.0.1" in exempt or "localhost" in exempt:
        yield Finding("proxy", Verdict.NOTE, "pulls go through the proxy of the environment", shown)
    else:
        yield Finding(
            "proxy",
            Verdict.WARN,
            "kubectl would ask the proxy for this node's API",
            shown,
            "export NO_PROXY=127.0.0.1,localhost,10.118.0.0/16",
        )


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    return f"{scheme}://…@{rest.rpartition('@')[2]}" if mark and "@" in rest else url
