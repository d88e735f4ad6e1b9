"""GVariant's text, in which annotations hold values for systemd's properties: `true`, `15`, `uint64 30000000`, `'word'`, `['a', 'b']`.

Only these forms, which are those that properties of scopes are written in. What is none of them raises Invalid.
"""

from __future__ import annotations

import re

from nacre.linux.dbus import Variant
from nacre.oci.errors import Invalid

# The words for integers, the bus's letter for each, and its range.
_INTEGERS = {
    "byte": ("y", 0, 0xFF),
    "int16": ("n", -(1 << 15), (1 << 15) - 1),
    "uint16": ("q", 0, (1 << 16) - 1),
    "int32": ("i", -(1 << 31), (1 << 31) - 1),
    "uint32": ("u", 0, (1 << 32) - 1),
    "int64": ("x", -(1 << 63), (1 << 63) - 1),
    "uint64": ("t", 0, (1 << 64) - 1),
}
_NUMBER = re.compile(r"(?:([a-z0-9]+)\s+)?([+-]?[0-9]+)")
_STRING = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")\s*""", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a"}


def parse(text: str, what: str) -> Variant:
    """The value that `text` writes. Raises Invalid, `what` being the act."""
    word = text.strip()
    if word in ("true", "false"):
        return Variant("b", word == "true")
    if number := _NUMBER.fullmatch(word):
        return _integer(number[1] or "int32", int(number[2]), what)
    if word[:1] == "[" and word[-1:] == "]" and len(word) > 1:
        return Variant("as", _strings(word[1:-1], what))
    found = _STRING.fullmatch(word)
    if found is None:
        raise _wrong(word, what)
    return Variant("s", _text(found))


def _integer(kind: str, value: int, what: str) -> Variant:
    if kind not in _INTEGERS:
        raise Invalid(what=what, cause=f"{kind!r} is no type of a number", remedy=f"types are {', '.join(_INTEGERS)}")
    letter, low, high = _INTEGERS[kind]
    if not low <= value <= high:
        raise Invalid(what=what, cause=f"{value} is outside {low}…{high}, the range of {kind}")
    return Variant(letter, value)


def _strings(text: str, what: str) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(text):
        match = _STRING.match(text, at)
        if match is None:
            raise _wrong(f"[{text}]", what)
        found.append(_text(match))
        at = match.end()
        if text[at : at + 1] not in ("", ","):
            raise _wrong(f"[{text}]", what)
        at += 1
    return found


def _text(match: re.Match[str]) -> str:
    quoted = match[1] if match[1] is not None else match[2]
    return re.sub(r"\\(.)", lambda one: _ESCAPES.get(one[1], one[1]), quoted, flags=re.DOTALL)


def _wrong(word: str, what: str) -> Invalid:
    return Invalid(what=what, cause=f"{word!r} is no value", remedy="write true, 15, uint64 15, 'word' or ['word', 'word']")
