"""Which proxy a request goes through, by the environment: HTTP_PROXY, HTTPS_PROXY, NO_PROXY, in either case, as curl and Go read them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping


def proxy_for(scheme: str, host: str, port: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """The proxy's URL, or None to go straight. Loopback is never asked for through a proxy."""
    proxy = environment.get(f"{scheme}_proxy") or environment.get(f"{scheme.upper()}_PROXY") or ""
    if not proxy or is_loopback(host) or _excepted(host, port, environment.get("no_proxy") or environment.get("NO_PROXY") or ""):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def _excepted(host: str, port: int, rules: str) -> bool:
    """NO_PROXY: `*`, addresses, networks as CIDR, names (with all below them), each with an optional port."""
    address = _address(host)
    for rule in (word.strip().lower() for word in rules.split(",")):
        if not rule:
            continue
        if rule == "*":
            return True
        if address is not None:
            try:
                if address in ipaddress.ip_network(rule, strict=False):
                    return True
            except ValueError:
                pass
        name, colon, number = rule.rpartition(":")
        if colon and number.isdigit() and ":" not in name:
            if int(number) != port:
                continue
            rule = name
        rule = rule.removeprefix("*").removeprefix(".")
        if host.lower() == rule or host.lower().endswith("." + rule):
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
