"""Label and field selectors: text into a test (apimachinery, labels and fields)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from nacre.api.status import bad_request

Test = Callable[[dict[str, Any]], bool]

_TOKEN = re.compile(r"\s*(?:(?P<op>==|!=|=|!|>|<|\(|\)|,)|(?P<word>[^\s=!<>(),]+))")
_KEY = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def labels(text: str) -> Test | None:
    """A test of an object's labels map, None when `text` selects everything; raises Refusal 400."""
    tokens = _tokens(text)
    if not tokens:
        return None
    tests: list[Test] = []
    while tokens:
        tests.append(_requirement(tokens, text))
        if tokens and (tokens.pop(0) != "," or not tokens):
            raise _unparsable(text)
    return lambda found: all(test(found) for test in tests)


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    text = text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _unparsable(text)
        found.append(match["op"] or match["word"])
        at = match.end()
    return found


def _requirement(tokens: list[str], text: str) -> Test:
    negated = tokens[0] == "!"
    if negated:
        tokens.pop(0)
    key = tokens.pop(0) if tokens else ""
    if not _KEY.fullmatch(key):
        raise _unparsable(text)
    if not tokens or tokens[0] == ",":
        return (lambda found: key not in found) if negated else (lambda found: key in found)
    if negated:
        raise _unparsable(text)
    operator = tokens.pop(0)
    if operator in ("in", "notin"):
        values = _set(tokens, text)
        return (lambda found: found.get(key) in values) if operator == "in" else (lambda found: found.get(key) not in values)
    value = tokens.pop(0) if tokens and tokens[0] != "," else ""
    if operator in (">", "<"):
        return _compared(key, operator, value, text)
    if operator not in ("=", "==", "!=") or not _VALUE.fullmatch(value):
        raise _unparsable(text)
    return (lambda found: found.get(key) != value) if operator == "!=" else (lambda found: found.get(key) == value)


def _set(tokens: list[str], text: str) -> frozenset[str]:
    if not tokens or tokens.pop(0) != "(" or ")" not in tokens:
        raise _unparsable(text)
    end = tokens.index(")")
    inside, tokens[: end + 1] = tokens[:end], []
    values = frozenset("".join(inside).split(","))
    if any(not _VALUE.fullmatch(value) for value in values):
        raise _unparsable(text)
    return values


def _compared(key: str, operator: str, value: str, text: str) -> Test:
    if not re.fullmatch(r"-?\d{1,18}", value):
        raise _unparsable(text)
    bound = int(value)

    def test(found: dict[str, Any]) -> bool:
        have = found.get(key, "")
        if not re.fullmatch(r"-?\d{1,18}", have):
            return False
        return int(have) > bound if operator == ">" else int(have) < bound

    return test


def _unparsable(text: str) -> Exception:
    return bad_request(f'unable to parse requirement: found invalid label selector "{text}"')


def fields(text: str, known: Iterable[str]) -> list[tuple[str, bool, str]]:
    """`text` as [(field, equal?, value)]; an unknown field is Refusal 400 in Kubernetes' words."""
    terms = []
    for term in re.split(r"(?<!\\),", text) if text else ():
        match = re.fullmatch(r"\s*([^=!\s]+?)\s*(==|!=|=)(.*)", term, re.S)
        if match is None:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{term}'")
        if match[1] not in known:
            raise bad_request(f"field label not supported: {match[1]}")
        terms.append((match[1], match[2] != "!=", re.sub(r"\\([\\,=])", r"\1", match[3]).strip()))
    return terms


def field_test(terms: list[tuple[str, bool, str]], read: Callable[[dict[str, Any], str], str]) -> Test | None:
    """A test of objects; `read(object, field)` gives a field's text, "" when it is unset."""
    if not terms:
        return None
    return lambda thing: all((read(thing, field) == value) is equal for field, equal, value in terms)
