"""Strategic merge, merge (RFC 7386) and JSON patch (RFC 6902)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.api import patch, schema
from nacre.api.status import Refusal

POD = schema.struct("io.k8s.api.core.v1.Pod")

documents = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab/~", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~", max_size=2), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abc"), documents, max_size=3)


def pod(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web"}, "spec": {"containers": list(containers), **spec}}


def test_a_container_is_found_by_its_name() -> None:
    before = pod({"name": "a", "image": "1"}, {"name": "b", "image": "1"})
    after = patch.strategic(before, pod({"name": "b", "image": "2"}), POD)
    assert [one["image"] for one in after["spec"]["containers"]] == ["1", "2"]


def test_ports_merge_by_port_and_protocol() -> None:
    ports = [{"containerPort": 53, "protocol": "TCP", "name": "t"}, {"containerPort": 53, "protocol": "UDP", "name": "u"}]
    change = [{"containerPort": 53, "protocol": "UDP", "name": "dns"}]
    after = patch.strategic(pod({"name": "a", "ports": ports}), pod({"name": "a", "ports": change}), POD)
    assert [one["name"] for one in after["spec"]["containers"][0]["ports"]] == ["t", "dns"]


def test_null_removes_and_patch_delete_removes_an_element() -> None:
    before = pod({"name": "a", "image": "1"}, {"name": "b", "image": "1"}, nodeSelector={"x": "1", "y": "2"})
    change = {"spec": {"containers": [{"name": "a", "$patch": "delete"}], "nodeSelector": {"x": None}}}
    after = patch.strategic(before, change, POD)
    assert after["spec"] == {"containers": [{"name": "b", "image": "1"}], "nodeSelector": {"y": "2"}}


def test_replace_and_retain_keys_leave_only_what_is_named() -> None:
    before = pod(volumes=[{"name": "v", "emptyDir": {}}], securityContext={"runAsUser": 1, "fsGroup": 2})
    volume = {"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}
    change = {"spec": {"volumes": [volume], "securityContext": {"$patch": "replace", "runAsUser": 3}}}
    after = patch.strategic(before, change, POD)["spec"]
    assert after["volumes"] == [{"name": "v", "hostPath": {"path": "/x"}}]
    assert after["securityContext"] == {"runAsUser": 3}


def test_the_order_asked_for_is_kept_and_the_servers_own_elements_stay() -> None:
    before = pod({"name": "injected"}, {"name": "a"}, {"name": "b"})
    change = {
        "spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "a", "image": "2"}]}
    }
    after = patch.strategic(before, change, POD)["spec"]
    assert [one["name"] for one in after["containers"]] == ["injected", "b", "a"]
    assert not any(key.startswith("$") for key in after)


def test_values_are_deleted_from_a_primitive_list() -> None:
    before = {"metadata": {"finalizers": ["x/a", "x/b"]}}
    change = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["x/a"], "finalizers": ["x/c"]}}
    assert patch.strategic(before, change, POD) == {"metadata": {"finalizers": ["x/b", "x/c"]}}


def test_lists_without_a_merge_key_are_replaced() -> None:
    before = pod({"name": "a", "args": ["1", "2"]})
    assert patch.strategic(before, pod({"name": "a", "args": ["3"]}), POD)["spec"]["containers"][0]["args"] == ["3"]


def test_an_element_without_its_key_is_refused() -> None:
    with pytest.raises(Refusal, match="does not contain declared merge key: name"):
        patch.strategic(pod(), pod({"image": "x"}), POD)


@given(objects, objects)
def test_no_patch_changes_its_arguments(target: dict[str, Any], change: dict[str, Any]) -> None:
    before = copy.deepcopy((target, change))
    patch.merge(target, change)
    assert (target, change) == before


@given(objects, objects)
def test_a_merge_patch_is_idempotent(target: dict[str, Any], change: dict[str, Any]) -> None:
    once = patch.merge(target, change)
    assert patch.merge(once, change) == once


@pytest.mark.parametrize(
    ("target", "change", "wanted"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ],
)
def test_merge_patch_does_what_the_rfc_lists(target: Any, change: Any, wanted: Any) -> None:
    assert patch.merge(target, change) == wanted


@given(documents, documents)
def test_json_patch_replaces_the_whole_document(target: Any, value: Any) -> None:
    assert patch.json_patch(target, [{"op": "replace", "path": "", "value": value}]) == value


@given(objects, st.text("ab/~01-", max_size=6), st.sampled_from(["add", "remove", "replace", "test", "move", "copy"]), documents)
def test_json_patch_either_applies_or_is_refused_and_never_touches_its_target(
    target: dict[str, Any], path: str, operation: str, value: Any
) -> None:
    before = copy.deepcopy(target)
    try:
        patch.json_patch(target, [{"op": operation, "path": "/" + path, "from": "/a", "value": value}])
    except Refusal as refusal:
        assert refusal.code == 422
    assert target == before


def test_json_patch_operations_in_turn() -> None:
    operations = [
        {"op": "test", "path": "/a/0", "value": 1},
        {"op": "add", "path": "/a/-", "value": 3},
        {"op": "add", "path": "/a/1", "value": 2},
        {"op": "move", "from": "/a/0", "path": "/b~1c"},
        {"op": "copy", "from": "/b~1c", "path": "/d"},
        {"op": "remove", "path": "/a/0"},
    ]
    assert patch.json_patch({"a": [1]}, operations) == {"a": [3], "b/c": 1, "d": 1}


def test_a_json_patch_whose_test_fails_is_refused() -> None:
    with pytest.raises(Refusal, match="testing value /a failed: test failed"):
        patch.json_patch({"a": 1}, [{"op": "test", "path": "/a", "value": True}])
