"""The agent's methods: records cross as JSON and come back the same; nothing else becomes a record."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.agent import machine, volumes
from nacre.agent import protocol as p
from nacre.agent.containers import adapt
from nacre.oci.errors import Invalid, Unsupported

RECORDS: list[Any] = [
    p.Hello(version=1, nonce="n"),
    p.Identify(entropy=bytes(range(64)), now_ns=1, hostname="h", machine_id="0" * 32),
    p.Network(addresses=["10.0.0.2/24"], routes=[["default", "10.0.0.1"]]),
    p.Sandbox(hostname="h", sysctls={"net.core.somaxconn": "1"}),
    p.Files(name="v", files=[p.File(path="a", content=b"\0\xff"), p.File(path="d", kind="directory")], generation="g"),
    p.Create(container="c", config={"process": {"args": ["x"]}}, root=p.Root(drive="slot0", uuid="u"), stdout=3),
    p.Exit(container="c", exec_id="", code=137, at_ns=5, oom_killed=True),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_went(record: Any) -> None:
    assert p.decode(type(record), json.loads(json.dumps(p.encode(record)))) == record


def test_every_method_and_event_has_a_record_that_is_known_by_its_fields() -> None:
    for kind in [pair[0] for pair in p.METHODS.values()] + list(p.EVENTS.values()):
        assert dataclasses.is_dataclass(kind)


@pytest.mark.parametrize(
    ("kind", "document", "words"),
    [
        (p.Start, {}, "Start.container is missing"),
        (p.Start, {"container": 5}, "Start.container is no str"),
        (p.Start, {"container": "a", "x": 1}, "Start.x is unknown"),
        (p.Start, [], "Start is no object"),
        (p.Start, {"container": "../etc"}, "is no name"),
        (p.Start, {"container": "a\n"}, "is no name"),
        (p.Kill, {"container": "a", "signal": True}, "Kill.signal is no int"),
        (p.Kill, {"container": "a", "signal": 1 << 80}, "out of range"),
        (p.Files, {"name": "v", "files": [{"path": "a", "content": "?"}]}, r"Files.files\[0\].content is no base64"),
        (p.Sandbox, {"hostname": "h", "sysctls": {"a": 1}}, r"Sandbox.sysctls\['a'\] is no str"),
        (p.Create, {"container": "c", "config": {}, "root": {"drive": "d"}}, "Create.root.uuid is missing"),
    ],
)
def test_a_wrong_document_is_refused_by_the_name_of_its_field(kind: type, document: Any, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        p.decode(kind, document)


@given(st.sampled_from(sorted(p.METHODS)), values)
def test_whatever_comes_is_a_record_or_invalid(method: str, document: Any) -> None:
    kind = p.METHODS[method][0]
    try:
        record = p.decode(kind, document)
    except Invalid:
        return
    assert isinstance(record, kind)


@given(st.sampled_from(RECORDS), st.data())
def test_a_record_with_one_field_changed_is_a_record_or_invalid(record: Any, data: st.DataObject) -> None:
    document = p.encode(record)
    document[data.draw(st.sampled_from(sorted(document)))] = data.draw(values)
    try:
        assert isinstance(p.decode(type(record), document), type(record))
    except Invalid:
        return


def adapted(config: dict[str, Any], pod_init: int = 0) -> dict[str, Any]:
    return adapt({"root": {"path": "/host/rootfs"}, "hostname": "h"} | config, "c1", pod_init)


def test_the_pods_namespaces_become_the_guests_own() -> None:
    spaces = [
        {"type": "mount"},
        {"type": "network", "path": "/run/n"},
        {"type": "uts", "path": "/run/u"},
        {"type": "pid", "path": "/run/p"},
    ]
    result = adapted({"linux": {"namespaces": spaces, "cgroupsPath": "/host"}}, pod_init=77)
    assert result["linux"]["namespaces"] == [{"type": "mount"}, {"type": "pid", "path": "/proc/77/ns/pid"}]
    assert result["linux"]["cgroupsPath"] == "/pod/c1"
    assert result["root"]["path"] == "rootfs"
    assert "hostname" not in result


def test_what_would_run_or_join_the_host_is_refused() -> None:
    with pytest.raises(Unsupported, match="hooks"):
        adapted({"hooks": {"poststop": [{"path": "/bin/x"}]}})
    with pytest.raises(Unsupported, match="mount namespace"):
        adapted({"linux": {"namespaces": [{"type": "mount", "path": "/proc/1/ns/mnt"}]}})


@given(st.text(alphabet="ab./\0", max_size=12), st.sampled_from(["", "g"]))
def test_a_volumes_file_lies_below_it_or_is_refused(path: str, generation: str) -> None:
    file = p.File(path=path)
    try:
        volumes._check(p.Files(name="v", files=[file], generation=generation), file)
    except Invalid:
        return
    assert os.path.normpath(f"/v/{path}") == f"/v/{path}"
    assert "\0" not in path
    assert not (generation and path.startswith(".."))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_a_list_of_processors_is_read_as_the_kernel_writes_it(numbers: set[int]) -> None:
    ordered = sorted(numbers)
    parts: list[str] = []
    for number in ordered:
        if parts and int(parts[-1].split("-")[-1]) == number - 1:
            parts[-1] = f"{parts[-1].split('-')[0]}-{number}"
        else:
            parts.append(str(number))
    assert machine._numbers(",".join(parts) + "\n") == ordered
