"""JSON as the short commands read and write it: what `json` does, without its regular expressions, which take longer to load than a command to run.

The reading is done by the same C function that `json` uses. Whatever that does not take as it is (a damaged document, bytes that are no
UTF-8) is given to `json` itself, for its words.
"""

from __future__ import annotations

try:
    from _json import encode_basestring_ascii as _quote
    from _json import make_scanner
except ImportError:  # another Python than CPython
    from json.encoder import encode_basestring_ascii as _quote
    from json.scanner import make_scanner

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

_BLANKS = " \t\n\r"
_NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": -float("inf")}


class _Reading:
    """How `json.loads` reads when nothing is asked of it."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, _NUMBERS.__getitem__
    memo: dict[str, str] = {}


_scan = make_scanner(_Reading)  # type: ignore[arg-type]  # the stub wants another scanner, C any object with these attributes


def loads(data: bytes | str) -> Any:
    """Raises ValueError as `json.loads` does."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value, end = _scan(text, len(text) - len(text.lstrip(_BLANKS)))
        if not text[end:].strip(_BLANKS):
            return value
    except (StopIteration, UnicodeDecodeError, SystemError):
        pass  # SystemError: up to Python 3.12 the scanner takes its exception from json.decoder only where that is loaded
    import json

    return json.loads(data)


def dumps(value: Any, indent: int = 0) -> str:
    """On one line without blanks, or with `indent` blanks a level; keys are strings."""
    return "".join(_pieces(value, " " * indent, "\n" if indent else ""))


def _pieces(value: Any, step: str, line: str) -> list[str]:
    """`line` is what begins a line here: a line break and the blanks of this level, or nothing."""
    if isinstance(value, str):
        return [_quote(value)]
    if value is None or value is True or value is False:
        return [{None: "null", True: "true", False: "false"}[value]]
    if isinstance(value, int):
        return [int.__repr__(value)]
    deeper = line and line + step
    if isinstance(value, dict):
        colon = ": " if line else ":"
        members = [[_quote(key), colon, *_pieces(one, step, deeper)] for key, one in value.items()]
        return _enclosed("{", members, "}", line, deeper)
    if isinstance(value, list | tuple):
        return _enclosed("[", [_pieces(one, step, deeper) for one in value], "]", line, deeper)
    raise TypeError(f"{type(value).__name__} is not written as JSON")


def _enclosed(opening: str, members: list[list[str]], closing: str, line: str, deeper: str) -> list[str]:
    made = [opening]
    for number, member in enumerate(members):
        made += ["," * (number > 0), deeper, *member]
    return [*made, line * bool(members), closing]
