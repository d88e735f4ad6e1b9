"""The resolvers that pods are given: the host's real ones. A loopback resolver would be the pod itself, so its upstream file is read."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from nacre.config import Config

MAIN = "/etc/resolv.conf"
UPSTREAM = (  # where local forwarders write whom they ask, in the order of trial
    "/run/systemd/resolve/resolv.conf",
    "/run/NetworkManager/no-stub-resolv.conf",
    "/run/NetworkManager/resolv.conf",
    "/run/dnsmasq/resolv.conf",
    "/run/resolvconf/resolv.conf",
    "/etc/resolv.dnsmasq.conf",
    "/etc/resolv.dnsmasq",
)
NAMESERVER_LIMIT = 3  # glibc reads no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolvers:
    """One resolv.conf(5), as far as pods can use it: nameservers without loopback and link-local ones, IPv4 first."""

    path: str
    nameservers: tuple[str, ...] = ()
    unusable: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        found = [f"nameserver {server}" for server in self.nameservers[:NAMESERVER_LIMIT]]
        if self.search:
            found.append("search " + " ".join(self.search))
        if self.options:
            found.append("options " + " ".join(self.options))
        return found


def resolv_conf(config: Config) -> list[str]:
    """Lines of resolv.conf for pods; without a nameserver line when this host knows none that a pod could reach (see `finding`)."""
    return find().lines()


def find(root: str = "") -> Resolvers:
    """The main file, or the first upstream file with usable nameservers if the main one has none; search and options stay the main's."""
    main = read(root, MAIN)
    if main.nameservers:
        return main
    for path in UPSTREAM:
        upstream = read(root, path)
        if upstream.nameservers:
            return Resolvers(
                path=path,
                nameservers=upstream.nameservers,
                unusable=main.unusable,
                search=main.search or upstream.search,
                options=tuple(option for option in main.options if option not in ("edns0", "trust-ad")) or upstream.options,
            )
    return main


def read(root: str, path: str) -> Resolvers:
    """One file; a missing one is an empty one. `search` and `domain`: the last of them counts (resolv.conf(5))."""
    servers: list[str] = []
    unusable: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    try:
        with open(root + path, encoding="utf-8", errors="replace") as file:
            rows = [line.split() for line in file if line.strip() and line.lstrip()[0] not in "#;"]
    except OSError:
        return Resolvers(path=path)
    for word, *rest in rows:
        if word == "nameserver" and rest:
            (servers if _reachable(rest[0]) else unusable).append(rest[0])
        elif word in ("search", "domain"):
            search = tuple(rest)
        elif word == "options":
            options += rest
    servers.sort(key=lambda server: ":" in server)  # stable: pods are IPv4, so those first
    return Resolvers(path=path, nameservers=tuple(servers), unusable=tuple(unusable), search=search, options=tuple(options))


def _reachable(server: str) -> bool:
    try:
        address = ipaddress.ip_address(server)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_link_local)


def finding(config: Config, root: str = "") -> dict[str, Any] | None:
    """What is wrong with the resolvers, for the doctor."""
    found = find(root)
    if found.nameservers:
        return None
    named = f"only {', '.join(found.unusable)}, which a pod cannot reach" if found.unusable else "no resolver"
    return {
        "level": "warn",
        "what": f"{MAIN} names {named}: pods cannot resolve names",
        "evidence": [f"looked also in {path}" for path in UPSTREAM],
        "remedy": f"write a nameserver that is not a loopback address into {MAIN}",
    }
