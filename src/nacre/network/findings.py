"""What on this host keeps pods from the network, each with evidence and remedy; for `nacre doctor`. Changes nothing."""

from __future__ import annotations

import subprocess
from typing import Any

from nacre.config import Config
from nacre.linux import nftables as nft
from nacre.linux.netlink import NetlinkError
from nacre.network import bridge, ranges, resolvers
from nacre.oci.errors import Failure

Finding = dict[
    str, Any
]  # level ("bad": pods cannot run, "warn": something will not work), what, evidence (list of lines), remedy
_LEGACY_TABLES = "/proc/net/ip_tables_names"


def findings(config: Config) -> list[Finding]:
    """Only what is wrong or doubtful; an empty list is a healthy host."""
    if config.cni_dir:
        from nacre.network.cni import CniNetwork

        status = CniNetwork(config).status()
        found = (
            [] if status.ready else [_finding("bad", status.message, [status.reason], f"put a .conflist into {config.cni_dir}")]
        )
    else:
        found = [*_forwarding(), *_range(config), *forward_policy(config.bridge)]
    named = resolvers.finding(config)
    return found + ([named] if named else []) + _ports(config)


def _finding(level: str, what: str, evidence: list[str], remedy: str) -> Finding:
    return {"level": level, "what": what, "evidence": evidence, "remedy": remedy}


def _forwarding() -> list[Finding]:
    try:
        with open(bridge.IP_FORWARD) as file:
            if file.read().strip() == "1":
                return []
        with open(bridge.IP_FORWARD, "r+b"):
            return []  # nacre sets it while the node is up
    except OSError as error:
        what = "net.ipv4.ip_forward is 0 and cannot be set: pods reach this host and each other, nothing beyond"
        return [
            _finding(
                "warn", what, [f"{bridge.IP_FORWARD}: {error.strerror}"], "sysctl -w net.ipv4.ip_forward=1 outside this container"
            )
        ]


def _range(config: Config) -> list[Finding]:
    try:
        ranges.choose(config)
    except Failure as failure:
        return [_finding("bad", str(failure), list(failure.evidence), failure.remedy)]
    except NetlinkError as error:
        return [_finding("bad", f"links and routes cannot be read: {error}", [], "")]
    return []


def forward_policy(link: str) -> list[Finding]:
    """Chains of others on the forward hook that drop what they do not know, unless they know `link`.

    An accept in nacre's own table cannot overrule them: in nftables a drop by any chain is final.
    """
    found = []
    try:
        chains = [chain for chain in nft.list_chains() if chain.hook == "forward" and chain.policy == "drop"]
        for chain in chains:
            if chain.family in ("ip", "inet") and not _knows(chain, link):
                found.append(_dropping(chain, link))
    except NetlinkError as error:
        remedy = "modprobe nf_tables"
        found.append(_finding("bad", f"nftables cannot be used: {error}", [], remedy))
    if _legacy_policy() == "DROP":
        what = "the FORWARD policy of iptables-legacy is DROP: pods' packets beyond this host are dropped"
        found.append(_finding("warn", what, ["iptables-legacy -S FORWARD: -P FORWARD DROP"], _iptables(link, "iptables-legacy")))
    return found


def _dropping(chain: nft.Chain, link: str) -> Finding:
    where = f"{chain.family} {chain.table} {chain.name}"
    by_iptables = chain.family == "ip" and chain.table == "filter" and chain.name == "FORWARD"
    who = "the FORWARD policy of iptables (Docker and ufw set it) is DROP" if by_iptables else f"chain {where} has policy drop"
    remedy = (
        _iptables(link, "iptables")
        if by_iptables
        else (f"nft insert rule {where} iifname {link} accept; nft insert rule {where} oifname {link} accept")
    )
    return _finding("warn", f"{who}: pods' packets beyond this host are dropped", [f"nft list chain {where}"], remedy)


def _iptables(link: str, command: str) -> str:
    return f"{command} -I FORWARD -i {link} -j ACCEPT; {command} -I FORWARD -o {link} -j ACCEPT"


def _knows(chain: nft.Chain, link: str) -> bool:
    """Some rule of the chain accepts by the link's name."""
    name = link.encode() + b"\0"
    for rule in nft.list_rules(chain.family, chain.table, chain.name):
        names = any(kind == "cmp" and data.get("data", {}).get("value", b"").startswith(name) for kind, data in rule.expressions)
        accepts = any(
            kind == "immediate" and data.get("data", {}).get("verdict", {}).get("code") == nft.Verdict.accept
            for kind, data in rule.expressions
        )
        if names and accepts:
            return True
    return False


def _legacy_policy() -> str:
    """Of the old iptables; asked only where its table is loaded, since asking loads it."""
    try:
        with open(_LEGACY_TABLES) as file:
            if "filter" not in file.read().split():
                return ""
        rows = subprocess.run(["iptables-legacy", "-S", "FORWARD"], capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return rows.split()[2] if rows.startswith("-P FORWARD") else ""


def _ports(config: Config) -> list[Finding]:
    """The node's ports against those that the kernel gives to outgoing connections, which can hold them when the node comes up."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            low, high = map(int, file.read().split())
        with open("/proc/sys/net/ipv4/ip_local_reserved_ports") as file:
            reserved = _numbers(file.read().strip())
    except OSError:
        return []
    found = []
    for key, port in (("api_port", config.api_port), ("kubelet_port", config.kubelet_port)):
        if low <= port <= high and not any(first <= port <= last for first, last in reserved):
            what = f"{key} {port} lies among the ports of outgoing connections: one of them may hold it when the node comes up"
            evidence = [f"net.ipv4.ip_local_port_range = {low} {high}"]
            found.append(
                _finding("warn", what, evidence, f"sysctl -w net.ipv4.ip_local_reserved_ports={port}, or set another {key}")
            )
    return found


def _numbers(text: str) -> list[tuple[int, int]]:
    """ "8080,9000-9010" as pairs of first and last."""
    pairs = (part.partition("-") for part in text.split(",") if part)
    return [(int(first), int(last or first)) for first, _dash, last in pairs]


__all__ = ["Finding", "findings", "forward_policy"]
