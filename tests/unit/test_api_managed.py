"""managedFields and server-side apply."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.api import kinds, managed
from nacre.api.status import Refusal

KIND = kinds.require("", "v1", "configmaps")
PODS = kinds.require("", "v1", "pods")
AT = "2026-01-01T00:00:00Z"

data = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"), min_size=1)


def config_map(values: dict[str, str], entries: list[Any] | None = None) -> dict[str, Any]:
    meta = {"name": "m", **({"managedFields": entries} if entries else {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": dict(values)}


def owners(thing: dict[str, Any]) -> dict[str, set[str]]:
    """manager -> keys of data it owns"""
    return {
        entry["manager"]: {key[2:] for key in entry["fieldsV1"].get("f:data", {}) if key.startswith("f:")}
        for entry in thing["metadata"].get("managedFields", [])
    }


def apply(live: dict[str, Any], values: dict[str, str], manager: str, *, force: bool = False) -> dict[str, Any]:
    return managed.apply(KIND, live, config_map(values), manager, force=force, subresource="", at=AT)


@given(data, data)
def test_who_changes_a_field_owns_it_alone(first: dict[str, str], second: dict[str, str]) -> None:
    made = config_map(first)
    managed.record(KIND, made, None, "one", "", AT)
    assert owners(made) == {"one": first.keys()}
    changed = config_map(second)
    managed.record(KIND, changed, made, "two", "", AT)
    mine = {key for key, value in second.items() if first.get(key) != value}
    found = owners(changed)
    assert found.get("two", set()) == mine
    assert found.get("one", set()) == second.keys() - mine


@given(data)
def test_the_written_form_is_read_back(values: dict[str, str]) -> None:
    paths = set(managed.flatten(config_map(values), KIND.structure))
    assert managed.from_fields(managed.to_fields(paths)) == paths


@given(data, data)
def test_applying_twice_changes_nothing(values: dict[str, str], other: dict[str, str]) -> None:
    live = config_map(other)
    managed.record(KIND, live, None, "one", "", AT)
    once = apply(live, values, "two", force=True)
    assert apply(copy.deepcopy(once), values, "two") == once


@given(data, data, data)
def test_what_is_applied_no_more_goes_unless_another_holds_it(
    others: dict[str, str], before: dict[str, str], after: dict[str, str]
) -> None:
    live = config_map(others)
    managed.record(KIND, live, None, "one", "", AT)
    held = owners(live)["one"]
    live = apply(live, before, "two", force=True)
    held &= owners(live).get("one", set())
    live = apply(live, after, "two", force=True)
    assert {key: live["data"][key] for key in after} == after
    assert live["data"].keys() == after.keys() | held


def test_a_conflict_names_field_and_holder() -> None:
    live = config_map({"a": "x"})
    managed.record(KIND, live, None, "one", "", AT)
    with pytest.raises(Refusal) as caught:
        apply(live, {"a": "y"}, "two")
    assert caught.value.code == 409
    assert caught.value.message == f'Apply failed with 1 conflict: conflict with "one" using v1 at {AT}: .data.a'
    assert caught.value.details["causes"][0]["reason"] == "FieldManagerConflict"


def test_elements_of_a_keyed_list_are_owned_one_by_one() -> None:
    def pod(*containers: dict[str, Any]) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": list(containers)}}

    live = pod({"name": "a", "image": "1"}, {"name": "b", "image": "1"})
    managed.record(PODS, live, None, "one", "", AT)
    config = pod({"name": "b", "env": [{"name": "E", "value": "v"}], "ports": [{"containerPort": 80}]})
    found = managed.apply(PODS, live, config, "two", force=False, subresource="", at=AT)
    assert [one["name"] for one in found["spec"]["containers"]] == ["a", "b"]
    assert found["spec"]["containers"][1]["image"] == "1"
    mine = next(entry for entry in found["metadata"]["managedFields"] if entry["manager"] == "two")
    element = mine["fieldsV1"]["f:spec"]["f:containers"]['k:{"name":"b"}']
    assert 'k:{"containerPort":80,"protocol":"TCP"}' in element["f:ports"]
    gone = managed.apply(PODS, found, pod({"name": "b"}), "two", force=False, subresource="", at=AT)
    assert "env" not in gone["spec"]["containers"][1] or gone["spec"]["containers"][1]["env"] == []


def test_conflicts_are_listed_under_who_holds_the_fields() -> None:
    live = config_map({"a": "x", "b": "x"})
    managed.record(KIND, live, None, "one", "", AT)
    with pytest.raises(Refusal) as caught:
        apply(live, {"a": "y", "b": "y"}, "two")
    assert caught.value.message == f'Apply failed with 2 conflicts: conflicts with "one" using v1 at {AT}:\n- .data.a\n- .data.b'
