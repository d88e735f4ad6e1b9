"""A decoded tree held against its kind's structure: unknown fields found, types checked, values brought to their one form.

What comes out has only known fields, no nulls, no empty lists or maps (as Kubernetes' own encoding has none), quantities in
canonical form. Words are those of Kubernetes' decoder.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import re
from typing import Any

from nacre.api import quantity
from nacre.api.schema import Struct, Type

_GO_WORDS = {"boolean": "bool", "number": "float64", "time": "string", "microtime": "string", "bytes": "[]uint8"}
_LIMITS = {"int32": 1 << 31, "int64": 1 << 63}
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})")
DEPTH = 64  # no kind nests deeper


class Mistyped(Exception):
    """The tree cannot be this kind: Kubernetes' sentence."""


class Marked(dict[str, Any]):
    """A mapping read from a text that named keys twice: `twice`, in order."""

    twice: tuple[str, ...] = ()


class Reader:
    """One tree's reading; `strict` collects what strict decoding objects to (unknown and duplicate fields)."""

    def __init__(self) -> None:
        self.strict: list[str] = []

    def read(self, tree: Any, struct: Struct) -> dict[str, Any]:
        """`tree` as an object of `struct`; raises Mistyped."""
        if not isinstance(tree, dict):
            raise Mistyped(f"json: cannot unmarshal {_json_word(tree)} into Go value of type v1.{struct.short}")
        return self._struct(tree, struct, "", "", 0)

    def _struct(self, tree: dict[str, Any], struct: Struct, path: str, dotted: str, depth: int) -> dict[str, Any]:
        if depth > DEPTH:
            raise Mistyped(f"exceeded max depth at {path}")
        found: dict[str, Any] = {}
        fields = struct.fields
        self._duplicates(tree, path)
        for key, value in tree.items():
            here = f"{path}.{key}" if path else key
            kind = fields.get(key)
            if kind is None:
                self.strict.append(f'unknown field "{here}"')
            elif value is not None:
                where = f"{dotted}.{key}" if dotted else key
                value = self._value(value, kind, here, where, struct, depth + 1)
                if value or not isinstance(value, dict | list) or kind.word in ("struct", "any"):
                    found[key] = value
        return found

    def _duplicates(self, tree: dict[str, Any], path: str) -> None:
        if isinstance(tree, Marked):
            self.strict.extend(f'duplicate field "{path}.{key}"' if path else f'duplicate field "{key}"' for key in tree.twice)

    def _value(self, value: Any, kind: Type, path: str, dotted: str, owner: Struct, depth: int) -> Any:
        word = kind.word
        if word == "struct":
            if not isinstance(value, dict):
                raise _mismatch(value, owner, dotted, "v1." + kind.struct.short)
            return self._struct(value, kind.struct, path, dotted, depth)
        if word == "list":
            return self._list(value, kind, path, dotted, owner, depth)
        if word == "map":
            return self._map(value, kind, path, dotted, owner, depth)
        if word == "any":
            return value
        return _scalar(value, word, dotted, owner)

    def _list(self, value: Any, kind: Type, path: str, dotted: str, owner: Struct, depth: int) -> list[Any]:
        items = kind.items
        assert items is not None
        if not isinstance(value, list):
            raise _mismatch(value, owner, dotted, "[]" + _go_word(items))
        return [
            self._value(_zero(items) if item is None else item, items, f"{path}[{index}]", dotted, owner, depth)
            for index, item in enumerate(value)
        ]

    def _map(self, value: Any, kind: Type, path: str, dotted: str, owner: Struct, depth: int) -> dict[str, Any]:
        items = kind.items
        assert items is not None
        if not isinstance(value, dict):
            raise _mismatch(value, owner, dotted, "map[string]" + _go_word(items))
        self._duplicates(value, path)
        return {
            key: self._value(_zero(items) if item is None else item, items, f"{path}.{key}", dotted, owner, depth)
            for key, item in value.items()
        }


def _scalar(value: Any, word: str, dotted: str, owner: Struct) -> Any:
    if word == "string":
        if isinstance(value, str):
            return value
    elif word in _LIMITS:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if -_LIMITS[word] <= value < _LIMITS[word]:
                return value
            raise Mistyped(f"json: cannot unmarshal number {value} into Go struct field {owner.short}.{dotted} of type {word}")
    elif word == "boolean":
        if isinstance(value, bool):
            return value
    elif word == "number":
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    elif word == "quantity":
        return _quantity(value)
    elif word == "intstr":
        if isinstance(value, str | int) and not isinstance(value, bool):
            return value
        raise Mistyped(f"json: cannot unmarshal {_json_word(value)} into Go value of type int32")
    elif isinstance(value, str):  # time, microtime, bytes
        return _bytes(value) if word == "bytes" else _time(value, word)
    raise _mismatch(value, owner, dotted, _GO_WORDS.get(word, word))


def _quantity(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Mistyped(str(quantity.NotAQuantity()))
    try:
        return quantity.canonical(value if isinstance(value, str) else repr(value))
    except quantity.NotAQuantity as error:
        raise Mistyped(str(error)) from error


def _bytes(value: str) -> str:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Mistyped("illegal base64 data") from error
    return value


def _time(value: str, word: str) -> str:
    """The instant in UTC as Kubernetes writes it: whole seconds, or six digits for a microtime."""
    try:
        if not _TIME.fullmatch(value):
            raise ValueError
        instant = datetime.datetime.fromisoformat(value.upper().replace("Z", "+00:00")).astimezone(datetime.UTC)
    except (ValueError, OverflowError) as error:
        raise Mistyped(f'parsing time "{value}" as "2006-01-02T15:04:05Z07:00": cannot parse "{value}" as "2006"') from error
    return written(instant, word)


def written(instant: datetime.datetime, word: str) -> str:
    """A UTC `instant` in the form of "time" or "microtime"; the year has four digits, which strftime does not see to."""
    return instant.replace(tzinfo=None).isoformat(timespec="microseconds" if word == "microtime" else "seconds") + "Z"


def _zero(kind: Type) -> Any:
    """What Go makes of a null inside a list or map."""
    word = kind.word
    if word in ("struct", "map", "any"):
        return {}
    if word == "list":
        return []
    return {"boolean": False, "int32": 0, "int64": 0, "number": 0, "intstr": 0, "quantity": "0"}.get(word, "")


def _mismatch(value: Any, owner: Struct, dotted: str, wanted: str) -> Mistyped:
    return Mistyped(f"json: cannot unmarshal {_json_word(value)} into Go struct field {owner.short}.{dotted} of type {wanted}")


def _go_word(kind: Type) -> str:
    if kind.word == "struct":
        return "v1." + kind.struct.short
    if kind.word in ("list", "map") and kind.items is not None:
        return ("[]" if kind.word == "list" else "map[string]") + _go_word(kind.items)
    return _GO_WORDS.get(kind.word, kind.word)


def _json_word(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        return "array"
    return "object" if isinstance(value, dict) else "null" if value is None else "number"
