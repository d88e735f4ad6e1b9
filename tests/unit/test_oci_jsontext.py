"""nacre's short way to JSON says and understands what the module `json` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.oci.jsontext import dumps, loads

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


def outcome(read: Callable[[Any], Any], data: bytes | str) -> str:
    try:
        return repr(read(data))
    except (ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


@given(TREES, st.sampled_from([1, 2, 4]))
def test_what_is_written_is_what_json_writes(tree: Any, indent: int) -> None:
    assert dumps(tree) == json.dumps(tree, separators=(",", ":"))
    assert dumps(tree, indent) == json.dumps(tree, indent=indent)


@given(TREES)
def test_what_was_written_is_read_back(tree: Any) -> None:
    assert loads(dumps(tree)) == tree and loads(dumps(tree, 2).encode()) == tree


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u \n\ufeff', max_size=30))
def test_any_bytes_and_any_text_are_read_as_json_reads_them(data: bytes | str) -> None:
    assert outcome(loads, data) == outcome(json.loads, data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" [1] x",
        b'{"a" 1}',
        b"{",
        b'{"a":1,}',
        b'"\n"',
        b"[1",
        b"\xef\xbb\xbf{}",
        b"[NaN, -Infinity, 1.5]",
        b"1" * 5000,
        b"[" * 100_000,
        "[1]".encode("utf-16"),
    ],
)
@pytest.mark.parametrize("loaded", [True, False])
def test_odd_documents_are_read_as_json_reads_them(monkeypatch: pytest.MonkeyPatch, data: bytes, loaded: bool) -> None:
    """Also in a process that has not loaded json, whose exception the scanner wants."""
    if not loaded:
        for name in [name for name in sys.modules if name.split(".")[0] == "json"]:
            monkeypatch.delitem(sys.modules, name)
    assert outcome(loads, data) == outcome(json.loads, data)


def test_what_json_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="set is not written as JSON"):
        dumps({"a": {1}})
