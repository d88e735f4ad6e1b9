"""Any object of Kubernetes' structure, any patch of it: taken or refused in words, and what was taken can be read, listed and changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre.api import decode, kinds, managed, meta, objects, patch, table, unsupported
from nacre.api.kind import Kind
from nacre.api.schema import Struct, Type
from nacre.api.shape import Mistyped, Reader
from nacre.api.status import Refusal

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WORDS = ["", "a", "web", "x-1", "8080", "Always", "File", "TCP", "../x", "/x", "é\0", "a/b", "1Gi", "kubernetes.io/tls"]
NUMBERS = [0, 1, -1, 8080, 70000, 2**31 - 1]
VALUES: dict[str, list[Any]] = {
    "string": WORDS,
    "boolean": [True, False],
    "int32": NUMBERS,
    "int64": [*NUMBERS, 2**62, -(2**63)],
    "number": NUMBERS,
    "intstr": [*NUMBERS, "http", ""],
    "bytes": ["", "YQ=="],
    "quantity": ["0", "1", "-1", "100m", "1Gi", "1e999", "9" * 40, "1n", 1e300],
    "time": ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-01-01T00:00:00.5+02:00"],
    "microtime": ["0001-01-01T00:00:00Z", "2026-01-01T00:00:00.123456789Z"],
    "any": [{}, {"f:a": {}}, {"k:{{": {}}, "text", {"f:a": 1e9}, []],
}
DIRECTIVES = ["$patch", "$retainKeys", "$setElementOrder/containers", "$deleteFromPrimitiveList/finalizers", "$setElementOrder/"]
JUNK: list[Any] = [
    None,
    5,
    "x",
    [],
    {},
    [5],
    {"$patch": "replace"},
    {"$patch": "delete"},
    [{"$patch": "replace"}, 5],
    "delete",
    True,
]


def value(random: Random, kind: Type, depth: int, wild: float) -> Any:
    """A value of type `kind`, now and then one of another type."""
    if random.random() < wild:
        return random.choice(JUNK)
    if kind.word == "struct":
        return tree(random, kind.struct, depth + 1, wild)
    if kind.items is None:
        return random.choice(VALUES[kind.word])
    count = random.choice([0, 1, 1, 2])
    if kind.word == "list":
        return [value(random, kind.items, depth + 1, wild) for _ in range(count)]
    return {random.choice(WORDS): value(random, kind.items, depth + 1, wild) for _ in range(count)}


def tree(random: Random, struct: Struct, depth: int = 0, wild: float = 0.0) -> dict[str, Any]:
    found = {
        name: value(random, kind, depth, wild)
        for name, kind in struct.fields.items()
        if random.random() < (0.8 if depth < 2 or name in struct.required else 1.5 / (depth + 1) ** 2)
    }
    if random.random() < wild:
        found[random.choice(DIRECTIVES)] = random.choice(JUNK)
    return found


def taken(kind: Kind, thing: dict[str, Any]) -> bool:
    """What the server does to a new object, short of storing it; whether it is accepted."""
    thing.setdefault("metadata", {}).update(name="x", creationTimestamp="2026-01-01T00:00:00Z")
    thing["apiVersion"], thing["kind"] = kind.api_version, kind.name
    kind.prepare_create(thing)
    kind.defaults(thing)
    refused, _ = unsupported.judge(kind.group, kind.name, thing)
    if meta.check(kind, thing) + managed.check(thing) + kind.check(thing) + refused:
        return False
    if "managedFields" not in thing["metadata"]:
        managed.record(kind, thing, None, "test", "", "2026-01-01T00:00:00Z")
    return True


def read_everywhere(kind: Kind, thing: dict[str, Any]) -> None:
    stored = objects.load(kind, objects.to_stored(kind, thing), 7)
    objects.encode(table.make(kind, [stored], {}, NOW))
    for name in kind.field_names:
        assert isinstance(kind.field(stored, name), str)
    change = copy.deepcopy(stored)
    change["metadata"]["labels"] = {"another": "label"}
    managed.record(kind, change, stored, "other", "", "2026-01-01T00:00:00Z")


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.resource)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_has_the_structure_is_taken_and_readable_or_refused(kind: Kind, seed: int) -> None:
    try:
        thing = Reader().read(tree(Random(seed), kind.structure), kind.structure)
    except Mistyped:
        return
    status = thing.pop("status", {})
    if taken(kind, thing):
        read_everywhere(kind, thing)
    # a status is written by whom may, and is not checked beyond its structure
    name = {"name": "x", "creationTimestamp": "2026-01-01T00:00:00Z"}
    read_everywhere(kind, {"metadata": name, "spec": {"containers": [{"name": "c"}]}, "status": status})


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.resource)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_patch_makes_a_tree_or_is_refused(kind: Kind, seed: int) -> None:
    random = Random(seed)
    before = Reader().read(tree(random, kind.structure), kind.structure)
    change = tree(random, kind.structure, wild=0.1)
    acts: list[Callable[[], Any]] = [
        lambda: patch.strategic(before, change, kind.structure),
        lambda: patch.merge(before, change),
    ]
    for act in acts:
        with contextlib.suppress(Refusal, Mistyped):
            Reader().read(act(), kind.structure)


@pytest.mark.parametrize("text", [rb'"\ud800"', rb'{"\udc00": 1}', rb'["\ud83d\u0041"]', rb'"\ud800\ud800"'])
def test_half_a_surrogate_pair_is_no_json(text: bytes) -> None:
    with pytest.raises(Refusal, match="json parse error"):
        decode.from_json(text)


def test_a_whole_surrogate_pair_is_its_letter() -> None:
    assert decode.from_json(rb'{"a": "\ud83d\ude00"}') == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("data", ["[]".encode("utf-16"), b"\xff", b"\xef\xbb\xbf{}"])
def test_json_is_utf_8(data: bytes) -> None:
    with pytest.raises(Refusal, match="json parse error"):
        decode.from_json(data)


@pytest.mark.parametrize(
    "text", [b"a: !!int x", b"a: !!float x", b"a: !!bool x", b"a: !foo x", b'a: "\\ud800"', b"&a [*a]", b"? [a]\n: b", b"<<: 5"]
)
def test_yaml_that_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(Refusal, match="error converting YAML to JSON"):
        decode.from_yaml(text)


def test_yaml_is_read_as_kubernetes_reads_it() -> None:
    text = b"{date: 2020-01-01, clock: 12:30, port: 22:22, octal: 012, yes: on, no: null, quoted: '1', list: [1_000]}"
    assert decode.from_yaml(text) == {
        "date": "2020-01-01", "clock": "12:30", "port": "22:22", "octal": 10, "true": True, "false": None, "quoted": "1", "list": [1000],
    }  # fmt: skip
