"""nftables over netlink, as far as pods need it: tables, chains, rules, maps, and transactions of them (linux/netfilter/nf_tables.h).

A rule is a list of expressions; each builder below makes one, named as `nft --debug=netlink` prints it. Registers: 32-bit ones are
numbered from R0, so that concatenated keys lie in neighbours. A Batch collects changes and commits them all or none; a packet meets the
old rules or the new ones, never a mixture. All functions raise NetlinkError with the kernel's errno (ENOENT: no such table).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from nacre.linux.netlink import BE32, BE64, RAW, TEXT, Flag, Kind, Layout, ListOf, NetlinkSocket, Request, Table

FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
_FAMILY_NAMES = {number: name for name, number in FAMILIES.items()}
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NETLINK_NETFILTER = 12
_BATCH_BEGIN, _BATCH_END = 16, 17

R0: Final = 8  # NFT_REG32_00
_VERDICT_REGISTER = 0
_IFNAMSIZ = 16
_MAP = 0x8  # NFT_SET_MAP
CT_STATUS_DNAT = 0x20  # IPS_DST_NAT


class _Msg(IntEnum):
    NEWTABLE = 0
    GETTABLE = 1
    DELTABLE = 2
    NEWCHAIN = 3
    GETCHAIN = 4
    DELCHAIN = 5
    NEWRULE = 6
    GETRULE = 7
    NEWSET = 9
    NEWSETELEM = 12
    GETSETELEM = 13
    DELSETELEM = 14


class Hook(IntEnum):
    """NF_INET_…"""

    prerouting = 0
    input = 1
    forward = 2
    output = 3
    postrouting = 4


class Priority(IntEnum):
    """The names that nft gives to numbers."""

    raw = -300
    dstnat = -100
    filter = 0
    srcnat = 100


class Verdict(IntEnum):
    drop = 0
    accept = 1


class Meta(IntEnum):
    iifname = 6
    oifname = 7
    l4proto = 16


class Type(IntEnum):
    """nft's numbers for what a map's key or value means; six bits each, concatenated from the left."""

    ipv4_addr = 7
    inet_proto = 12
    inet_service = 13


_VERDICT_DATA = Table({"code": (1, BE32), "chain": (2, TEXT)})
_DATA = Table({"value": (1, RAW), "verdict": (2, _VERDICT_DATA)})
_EXPRESSION_DATA: dict[str, Table] = {
    "immediate": Table({"dreg": (1, BE32), "data": (2, _DATA)}),
    "bitwise": Table({"sreg": (1, BE32), "dreg": (2, BE32), "len": (3, BE32), "mask": (4, _DATA), "xor": (5, _DATA)}),
    "cmp": Table({"sreg": (1, BE32), "op": (2, BE32), "data": (3, _DATA)}),
    "lookup": Table({"set": (1, TEXT), "sreg": (2, BE32), "dreg": (3, BE32)}),
    "payload": Table({"dreg": (1, BE32), "base": (2, BE32), "offset": (3, BE32), "len": (4, BE32)}),
    "meta": Table({"dreg": (1, BE32), "key": (2, BE32)}),
    "ct": Table({"dreg": (1, BE32), "key": (2, BE32)}),
    "fib": Table({"dreg": (1, BE32), "result": (2, BE32), "flags": (3, BE32)}),
    "nat": Table({"type": (1, BE32), "family": (2, BE32), "addr_min": (3, BE32), "proto_min": (5, BE32)}),
    "masq": Table({}),
    "counter": Table({"bytes": (1, BE64), "packets": (2, BE64)}),
}


class _Expression:
    """NFTA_LIST_ELEM of a rule: a name, and data whose table depends on the name."""

    flag = 0x8000
    _frame = Table({"name": (1, TEXT), "data": (2, RAW)})

    def encode(self, value: tuple[str, Mapping[str, Any]]) -> bytes:
        name, data = value
        nested = Table({"name": (1, TEXT), "data": (2, _EXPRESSION_DATA[name])})
        return nested.encode({"name": name, "data": data})

    def decode(self, data: bytes) -> tuple[str, dict[str, Any]]:
        found = self._frame.decode(data)
        name, inner = found.get("name", ""), found.get("data", b"")
        table = _EXPRESSION_DATA.get(name)
        return name, table.decode(inner) if table else {"raw": inner}


Expression = tuple[str, dict[str, Any]]

_ELEMENT = Table({"key": (1, _DATA), "data": (2, _DATA)})
_HOOK = Table({"hook": (1, BE32), "priority": (2, BE32)})
_ATTRIBUTES: dict[str, dict[str, tuple[int, Kind]]] = {
    "table": {"name": (1, TEXT), "flags": (2, BE32)},
    "chain": {"table": (1, TEXT), "name": (3, TEXT), "hook": (4, _HOOK), "policy": (5, BE32), "type": (7, TEXT)},
    "rule": {"table": (1, TEXT), "chain": (2, TEXT), "expressions": (4, ListOf(_Expression()))},
    "set": {
        "table": (1, TEXT),
        "name": (2, TEXT),
        "flags": (3, BE32),
        "key_type": (4, BE32),
        "key_len": (5, BE32),
        "data_type": (6, BE32),
        "data_len": (7, BE32),
        "id": (10, BE32),
        "userdata": (13, RAW),
    },
    "elements": {"table": (1, TEXT), "set": (2, TEXT), "elements": (3, ListOf(_ELEMENT))},
}
_LAYOUTS = {name: Layout("=BBH", ("family", "version", "resource"), Table(table)) for name, table in _ATTRIBUTES.items()}


def _request(message: _Msg, layout: str, family: str, values: Mapping[str, Any], target: str, flags: int = 0) -> Request:
    body = _LAYOUTS[layout].encode({"family": FAMILIES[family] if family else 0}, values)
    return Request(_SUBSYSTEM | message, flags, body, f"NFT_MSG_{message.name}", target)


def _marker(kind: int, words: str) -> Request:
    return Request(kind, 0, struct.pack(">BBH", 0, 0, _SUBSYSTEM >> 8), words)


def open_socket(netns_fd: int | None = None) -> NetlinkSocket:
    return NetlinkSocket(netns_fd, protocol=_NETLINK_NETFILTER)


# What rules are made of


def meta(key: Meta, register: int = R0) -> Expression:
    return "meta", {"key": key, "dreg": register}


def ct_status(register: int = R0) -> Expression:
    return "ct", {"key": 2, "dreg": register}


def source_address(register: int = R0) -> Expression:
    """The IPv4 header's source."""
    return "payload", {"dreg": register, "base": 1, "offset": 12, "len": 4}


def destination_address(register: int = R0) -> Expression:
    """The IPv4 header's destination."""
    return "payload", {"dreg": register, "base": 1, "offset": 16, "len": 4}


def destination_port(register: int = R0) -> Expression:
    """Of TCP, UDP and SCTP alike: they have it in the same place."""
    return "payload", {"dreg": register, "base": 2, "offset": 2, "len": 2}


def destination_is_local(register: int = R0) -> list[Expression]:
    """The destination is an address of this host (fib daddr type local)."""
    return [("fib", {"dreg": register, "result": 3, "flags": 2}), compare(struct.pack("=I", 2), register)]


def compare(value: bytes, register: int = R0, *, equal: bool = True) -> Expression:
    return "cmp", {"sreg": register, "op": 0 if equal else 1, "data": {"value": value}}


def bits(mask: bytes, register: int = R0) -> Expression:
    zero = bytes(len(mask))
    return "bitwise", {"sreg": register, "dreg": register, "len": len(mask), "mask": {"value": mask}, "xor": {"value": zero}}


def interface(key: Meta, name: str) -> list[Expression]:
    """Arrives at or leaves by the link called `name`."""
    return [meta(key), compare(name.encode().ljust(_IFNAMSIZ, b"\0"))]


def within(load: Expression, network: str, *, inside: bool = True) -> list[Expression]:
    """The loaded IPv4 address lies in `network`, "10.118.0.0/16" (or outside of it)."""
    parsed = ipaddress.IPv4Network(network)
    return [load, bits(parsed.netmask.packed), compare(parsed.network_address.packed, equal=inside)]


def was_dnatted() -> list[Expression]:
    """The connection's destination was rewritten (ct status dnat)."""
    return [ct_status(), bits(struct.pack("=I", CT_STATUS_DNAT)), compare(bytes(4), equal=False)]


def lookup(map_name: str, register: int = R0) -> Expression:
    """The registers from `register` on as the map's key; its value goes there too. Without a match the rule ends."""
    return "lookup", {"set": map_name, "sreg": register, "dreg": register}


def dnat(address_register: int = R0, port_register: int = R0 + 1) -> Expression:
    return "nat", {"type": 1, "family": FAMILIES["ip"], "addr_min": address_register, "proto_min": port_register}


def masquerade() -> Expression:
    return "masq", {}


def counter() -> Expression:
    return "counter", {"bytes": 0, "packets": 0}


def verdict(code: Verdict) -> Expression:
    return "immediate", {"dreg": _VERDICT_REGISTER, "data": {"verdict": {"code": code}}}


def concatenated(*parts: bytes) -> bytes:
    """A key or value of several parts, each padded to a register."""
    return b"".join(part + b"\0" * (-len(part) % 4) for part in parts)


class Batch:
    """A transaction: changes in order, committed together."""

    def __init__(self, family: str, table: str) -> None:
        self._family, self._table = family, table
        self._requests: list[Request] = []
        self._sets = 0

    def _add(self, message: _Msg, layout: str, values: Mapping[str, Any], target: str, flags: int = 0) -> None:
        self._requests.append(_request(message, layout, self._family, values, f"{self._family} {self._table}{target}", flags))

    def table(self) -> None:
        """Make the table unless it is there."""
        self._add(_Msg.NEWTABLE, "table", {"name": self._table, "flags": 0}, "", Flag.CREATE)

    def drop_table(self) -> None:
        self._add(_Msg.DELTABLE, "table", {"name": self._table}, "")

    def chain(self, name: str, kind: str, hook: Hook, priority: int) -> None:
        """A base chain of kind "filter" or "nat", policy accept."""
        where = {"hook": hook, "priority": priority & 0xFFFFFFFF}
        values = {"table": self._table, "name": name, "hook": where, "policy": Verdict.accept, "type": kind}
        self._add(_Msg.NEWCHAIN, "chain", values, f" {name}", Flag.CREATE)

    def rule(self, chain: str, *expressions: Expression | list[Expression]) -> None:
        """Append a rule; lists among the expressions are flattened."""
        flat: list[Expression] = []
        for item in expressions:
            flat.extend(item if isinstance(item, list) else [item])
        values = {"table": self._table, "chain": chain, "expressions": flat}
        self._add(_Msg.NEWRULE, "rule", values, f" {chain}", Flag.CREATE | Flag.APPEND)

    def map(self, name: str, key: Sequence[Type], value: Sequence[Type]) -> None:
        """An empty map; keys and values are made by `concatenated`."""
        self._sets += 1
        values = {
            "table": self._table,
            "name": name,
            "flags": _MAP,
            "key_type": _type_number(key),
            "key_len": 4 * len(key),
            "data_type": _type_number(value),
            "data_len": 4 * len(value),
            "id": self._sets,
        }
        self._add(_Msg.NEWSET, "set", values, f" {name}", Flag.CREATE)

    def elements(self, map_name: str, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Put pairs of key and value into the map; EEXIST at commit when a key is there."""
        items = [{"key": {"value": key}, "data": {"value": value}} for key, value in pairs]
        if items:
            values = {"table": self._table, "set": map_name, "elements": items}
            self._add(_Msg.NEWSETELEM, "elements", values, f" {map_name}", Flag.CREATE | Flag.EXCL)

    def drop_elements(self, map_name: str, keys: Iterable[bytes]) -> None:
        """Take keys out; ENOENT at commit when one is not there."""
        items = [{"key": {"value": key}} for key in keys]
        if items:
            values = {"table": self._table, "set": map_name, "elements": items}
            self._add(_Msg.DELSETELEM, "elements", values, f" {map_name}")

    def commit(self, on: NetlinkSocket | None = None) -> None:
        """All of it or none."""
        if on is None:
            with open_socket() as made:
                self.commit(made)
            return
        on.batch(_marker(_BATCH_BEGIN, "NFNL_MSG_BATCH_BEGIN"), self._requests, _marker(_BATCH_END, "NFNL_MSG_BATCH_END"))


def _type_number(types: Sequence[Type]) -> int:
    number = 0
    for part in types:
        number = number << 6 | part
    return number


# What is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    family: str
    table: str
    name: str
    type: str = ""  # of base chains: "filter", "nat", "route"
    hook: str = ""  # of base chains: "forward", …
    priority: int = 0
    policy: str = ""  # "accept", "drop"; empty for chains without a hook


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    family: str
    table: str
    chain: str
    expressions: tuple[Expression, ...]


def _dump(message: _Msg, layout: str, family: str, values: Mapping[str, Any], on: NetlinkSocket | None) -> list[dict[str, Any]]:
    if on is None:
        with open_socket() as made:
            return _dump(message, layout, family, values, made)
    return [_LAYOUTS[layout].decode(found.body) for found in on.dump(_request(message, layout, family, values, ""))]


def _family(fields: Mapping[str, Any]) -> str:
    return _FAMILY_NAMES.get(fields["family"], str(fields["family"]))


def list_tables(*, on: NetlinkSocket | None = None) -> list[tuple[str, str]]:
    """(family, name) of every table."""
    return [(_family(fields), fields["name"]) for fields in _dump(_Msg.GETTABLE, "table", "", {}, on)]


def list_chains(*, on: NetlinkSocket | None = None) -> list[Chain]:
    """Every chain of every table; iptables-nft's among them (FORWARD of table filter)."""
    chains = []
    for fields in _dump(_Msg.GETCHAIN, "chain", "", {}, on):
        facts: dict[str, Any] = {}
        if "hook" in fields:
            hook, priority = fields["hook"].get("hook", -1), fields["hook"].get("priority", 0)
            names = {item.value: item.name for item in Hook} if _family(fields) in ("ip", "ip6", "inet", "bridge") else {}
            facts["hook"] = names.get(hook, str(hook))
            facts["priority"] = priority - (1 << 32) if priority >= 1 << 31 else priority
        if "policy" in fields:
            facts["policy"] = "drop" if fields["policy"] == Verdict.drop else "accept"
        chains.append(
            Chain(family=_family(fields), table=fields["table"], name=fields["name"], type=fields.get("type", ""), **facts)
        )
    return chains


def list_rules(family: str, table: str, chain: str, *, on: NetlinkSocket | None = None) -> list[Rule]:
    found = _dump(_Msg.GETRULE, "rule", family, {"table": table, "chain": chain}, on)
    return [
        Rule(family=family, table=table, chain=chain, expressions=tuple(fields.get("expressions", ())))
        for fields in found
        if fields.get("chain") == chain
    ]


def list_elements(family: str, table: str, map_name: str, *, on: NetlinkSocket | None = None) -> list[tuple[bytes, bytes]]:
    """(key, value) pairs of a map; a set's values are empty."""
    pairs = []
    for fields in _dump(_Msg.GETSETELEM, "elements", family, {"table": table, "set": map_name}, on):
        for item in fields.get("elements", ()):
            pairs.append((item.get("key", {}).get("value", b""), item.get("data", {}).get("value", b"")))
    return pairs


def delete_table(family: str, name: str, *, on: NetlinkSocket | None = None) -> None:
    """The table goes with all that is in it; ENOENT when there is none."""
    batch = Batch(family, name)
    batch.drop_table()
    batch.commit(on)
