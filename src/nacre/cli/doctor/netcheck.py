"""The doctor's look at the network: ports, ranges, forwarding, resolvers, proxies."""

from __future__ import annotations

import os
import subprocess
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


def ranges(config: Config) -> Iterator[Finding]:
    """The pods' addresses against every network that the host routes."""
    holder = taken.pod_range(config)
    if holder:
        yield Finding(
            "pod range",
            Verdict.BAD,
            f"{config.pod_cidr} overlaps {holder.what} of {holder.who}",
            tuple(f"{other.what} {other.who}" for other in taken.networks()),
            f'set pod_cidr in {config.etc}/config.toml, for example pod_cidr = "10.119.0.0/16"',
        )
    else:
        says = "a free range is chosen" if config.pod_cidr == "auto" else f"{config.pod_cidr} is free"
        yield Finding("pod range", Verdict.OK, says)


def forwarding(_config: Config) -> Iterator[Finding]:
    """ip_forward (nacre sets it while up) and other people's forward chains with policy drop (nacre cannot overrule them)."""
    with open("/proc/sys/net/ipv4/ip_forward") as file:
        on = file.read().strip() == "1"
    try:
        with open("/proc/sys/net/ipv4/ip_forward", "r+b"):
            writable = True
    except OSError:
        writable = False
    if on or writable:
        yield Finding("forwarding", Verdict.OK, f"net.ipv4.ip_forward is {int(on)}" + ("" if on else ", nacre sets it while up"))
    else:
        yield Finding(
            "forwarding",
            Verdict.WARN,
            "net.ipv4.ip_forward is 0 and cannot be set: pods reach the host, not the network",
            ("/proc/sys is read-only here",),
            "sysctl net.ipv4.ip_forward=1 outside this container",
        )
    yield from _dropping_chains()


def _dropping_chains() -> Iterator[Finding]:
    from nacre.linux import nftables

    for chain in nftables.list_chains():
        if chain.hook == "forward" and chain.policy == "drop":
            yield Finding(
                "forwarding",
                Verdict.WARN,
                f"chain {chain.family} {chain.table} {chain.name} drops what it does not know, pods' packets too",
                (f"hook forward, policy drop, in {'iptables' if chain.name.isupper() else 'nftables'}",),
                "iptables -I FORWARD -i nacre0 -j ACCEPT; iptables -I FORWARD -o nacre0 -j ACCEPT"
                if chain.name.isupper()
                else f"nft insert rule {chain.family} {chain.table} {chain.name} iifname nacre0 accept",
            )
    legacy = _legacy_policy()
    if legacy == "DROP":
        yield Finding(
            "forwarding",
            Verdict.WARN,
            "the FORWARD policy of iptables-legacy is DROP",
            (),
            "iptables-legacy -P FORWARD ACCEPT, or a rule that accepts nacre0",
        )


def _legacy_policy() -> str:
    """The old iptables' FORWARD policy; only asked where its table is loaded, since asking loads it."""
    try:
        with open("/proc/net/ip_tables_names") as file:
            if "filter" not in file.read():
                return ""
        rows = subprocess.run(["iptables-legacy", "-S", "FORWARD"], capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return rows.split()[2] if rows.startswith("-P FORWARD") else ""


def resolvers(config: Config) -> Iterator[Finding]:
    """What pods get as resolv.conf; a loopback resolver would be the pod itself."""
    from nacre.network import resolv_conf

    lines = resolv_conf(config)
    servers = [line.split()[1] for line in lines if line.startswith("nameserver")]
    loopback = [server for server in servers if server.startswith("127.") or server == "::1"]
    if loopback or not servers:
        cause = f"only loopback resolvers are known ({', '.join(loopback)})" if loopback else "no resolver is known"
        yield Finding("names", Verdict.WARN, f"{cause}: pods cannot resolve names", (), "write a real one into /etc/resolv.conf")
    else:
        yield Finding("names", Verdict.OK, f"pods ask {', '.join(servers)}")


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
