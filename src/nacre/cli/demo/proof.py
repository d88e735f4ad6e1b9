"""The host before and after: what a demo must leave as it found it, and what it leaves on disk on purpose."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from ipaddress import ip_address, ip_network

from nacre.cli import host, output, reset
from nacre.config import Config
from nacre.images import build_demo
from nacre.linux import cgroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Photograph:
    """Sets of names, each as a person would look for it; `census` is the node's own, the others are the whole host's."""

    census: frozenset[str]
    mounts: frozenset[str]
    links: frozenset[str]
    addresses: frozenset[str]
    tables: frozenset[str]
    cgroups: frozenset[str]
    sysctls: frozenset[str]


def photograph(config: Config) -> Photograph:
    return Photograph(
        census=frozenset(host.census(config).lines()),
        mounts=frozenset(_mounts()),
        links=frozenset(os.listdir("/sys/class/net")),
        addresses=frozenset(_addresses()),
        tables=frozenset(_tables()),
        cgroups=frozenset(_cgroups()),
        sysctls=frozenset(f"{name} = {value}" for name, value in host.sysctls().items()),
    )


def _mounts() -> list[str]:
    with open("/proc/self/mountinfo") as file:
        return [f"{line.split()[4]} ({line.partition(' - ')[2].split()[0]})" for line in file]


def _addresses() -> list[str]:
    """Local IPv4 addresses as the routing table knows them."""
    with open("/proc/net/fib_trie") as file:
        rows = [line.split() for line in file]
    return [rows[i - 1][1] for i, row in enumerate(rows) if row[:2] == ["/32", "host"] and len(rows[i - 1]) > 1]


def _tables() -> list[str]:
    from nacre.linux import nftables

    return [f"{family} {name}" for family, name in nftables.list_tables()]


def _cgroups() -> list[str]:
    """Top levels of every hierarchy: a node's groups all lie under one of its own."""
    layout = cgroups.discover()
    return [f"{h.mount}/{name}" for h in layout.hierarchies for name in os.listdir(h.mount) if os.path.isdir(f"{h.mount}/{name}")]


def held(config: Config) -> frozenset[str]:
    """Names of what the node has on the host now, and its addresses: for `differences`."""
    now, pods = host.census(config), ip_network(config.pod_cidr)
    addresses = (address for address in _addresses() if ip_address(address) in pods)
    return frozenset((*now.mounts, *now.links, *now.tables, *now.cgroups, *addresses))


def differences(before: Photograph, after: Photograph, own: frozenset[str]) -> tuple[list[str], list[str]]:
    """(what of the node's own stayed or changed, what else changed on this host meanwhile), one line a thing.

    `own` is `held` while the node ran: what is new and was never the node's has come from somebody else.
    """
    ours: list[str] = []
    others: list[str] = []
    for field in fields(Photograph):
        old, new = getattr(before, field.name), getattr(after, field.name)
        always = field.name in ("census", "sysctls")
        for thing in sorted(new - old):
            (ours if always or thing.partition(" (")[0] in own else others).append(f"{field.name}: {thing} is new")
        for thing in sorted(old - new):
            (ours if always else others).append(f"{field.name}: {thing} is gone")
    return ours, others


def show(config: Config, left: list[str], others: list[str], *, node_left_up: bool) -> None:
    """The verdict, then what stays on purpose with its size and the command that removes it."""
    output.say()
    if node_left_up:
        output.say("The node was up before and stays up.")
    elif not left:
        output.say("No process, mount, link, address, rule, cgroup or sysctl of ours is left.", "ok")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        output.say(f"Meanwhile, by somebody else: {'; '.join(others[:3])}{more}.", "dim")
    rows = [(what, output.size(size), command) for what, size, command in _stays(config)]
    output.table(("what stays", "size", "remove it with"), rows)


def _stays(config: Config) -> list[tuple[str, int, str]]:
    """(what, bytes, the command that removes it) of everything that set-up and demo left on purpose."""
    prefix = f" --prefix {shlex.quote(config.prefix)}" if config.prefix else ""
    checkout = os.path.dirname(sys.prefix)
    trees = [(f"images, appliance, keys, logs ({config.data})", config.data, f"nacre{prefix} reset")]
    if os.path.exists(f"{checkout}/run"):
        trees.append((f"downloads ({checkout}/.cache)", f"{checkout}/.cache", f"rm -r {shlex.quote(checkout + '/.cache')}"))
    else:
        cache = build_demo.software_directory(config)
        trees.append((f"downloads ({cache})", cache, f"rm -r {shlex.quote(cache)}"))
    trees.append((f"Python environment ({sys.prefix})", sys.prefix, f"rm -r {shlex.quote(sys.prefix)}"))
    stays = [(what, reset.tree_size(path), command) for what, path, command in trees if os.path.exists(path)]
    link = "/usr/local/bin/nacre"
    if os.path.islink(link) and os.path.realpath(link).startswith(sys.prefix + "/"):
        stays.append((link, 0, f"rm {link}"))
    return stays + _packages(f"{checkout}/.cache/installed-by-apt")


def _packages(note: str) -> list[tuple[str, int, str]]:
    """What `./run` installed, by its note, with what came along and nothing else needs."""
    try:
        with open(note) as file:
            names = sorted(set(file.read().split()))
    except FileNotFoundError:
        return []
    command = ["apt-get", "autoremove", *names]
    trial = subprocess.run([command[0], "-s", "-qq", *command[1:]], capture_output=True, text=True, check=False)
    going = [line.split()[1] for line in trial.stdout.splitlines() if line.startswith("Remv ")]
    if not going:
        return []
    query = ["dpkg-query", "-W", "-f", "${Installed-Size}\\n", *going]
    sizes = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return [(f"{len(going)} packages ({', '.join(names)})", sum(map(int, sizes)) << 10, shlex.join(command))]
