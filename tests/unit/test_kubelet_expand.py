"""Environment variables: where they come from, what references become."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.kubelet.expand import ConfigError, Sources, environment, expanded

POD: dict[str, Any] = {
    "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "labels": {"app": "web", "tier": 'a"b'}},
    "spec": {
        "nodeName": "node1",
        "containers": [{"name": "main", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}}}],
    },
    "status": {"podIP": "10.1.0.2", "podIPs": [{"ip": "10.1.0.2"}]},
}
OBJECTS: dict[tuple[str, str], dict[str, Any] | None] = {
    ("ConfigMap", "words"): {
        "metadata": {},
        "data": {"greeting": "hello"},
        "binaryData": {"raw": base64.b64encode(b"\xff").decode()},
    },
    ("Secret", "keys"): {"metadata": {}, "data": {"word": base64.b64encode(b"swordfish").decode()}},
    ("ConfigMap", "gone"): None,
}
SOURCES = Sources(POD, OBJECTS, {"address": "192.0.2.1", "capacity": {"cpu": "4"}})


def made(*variables: dict[str, Any], **container: Any) -> dict[str, str]:
    return environment({"name": "main", "env": list(variables)} | container, SOURCES)


def of(name: str, **origin: Any) -> dict[str, Any]:
    return {"name": name, "valueFrom": origin}


def test_values_come_from_config_maps_secrets_and_the_pod() -> None:
    assert made(
        of("A", configMapKeyRef={"name": "words", "key": "greeting"}),
        of("B", secretKeyRef={"name": "keys", "key": "word"}),
        of("C", fieldRef={"fieldPath": "status.podIP"}),
        of("D", fieldRef={"fieldPath": "metadata.labels['app']"}),
        of("E", resourceFieldRef={"resource": "limits.cpu"}),
        of("F", resourceFieldRef={"resource": "limits.memory", "divisor": "1Mi"}),
    ) == {"A": "hello", "B": "swordfish", "C": "10.1.0.2", "D": "web", "E": "2", "F": "64"}


def test_whole_maps_are_taken_with_their_prefix_and_own_variables_win() -> None:
    from_map = [{"prefix": "P_", "configMapRef": {"name": "words"}}, {"secretRef": {"name": "keys"}}]
    assert made({"name": "word", "value": "own"}, envFrom=from_map) == {"P_greeting": "hello", "P_raw": "\udcff", "word": "own"}


def test_references_see_what_stands_before_them_and_unknown_ones_stay() -> None:
    assert made({"name": "A", "value": "1"}, {"name": "B", "value": "$(A)-$(C)-$$(A)"}) == {"A": "1", "B": "1-$(C)-$(A)"}


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"configMapKeyRef": {"name": "gone", "key": "x"}}, 'configmap "gone" not found'),
        ({"configMapKeyRef": {"name": "words", "key": "x"}}, "couldn't find key x in ConfigMap shop/words"),
        ({"fieldRef": {"fieldPath": "spec.nonsense"}}, "spec.nonsense"),
    ],
)
def test_what_is_not_there_is_named(origin: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        made({"name": "A", "valueFrom": origin})


def test_what_is_optional_may_be_missing() -> None:
    assert made(of("A", configMapKeyRef={"name": "gone", "key": "x", "optional": True})) == {}
    assert made(envFrom=[{"configMapRef": {"name": "gone", "optional": True}}]) == {}


def test_labels_are_written_one_a_line_quoted() -> None:
    assert SOURCES.field("metadata.labels") == 'app="web"\ntier="a\\"b"'


@given(st.text(alphabet="$()ABab \n"))
def test_text_without_known_names_only_loses_doubled_dollars(text: str) -> None:
    assert expanded(text, {}).replace("$", "") == text.replace("$", "")


@given(st.text(alphabet="$()AB", max_size=30), st.text(alphabet="$()AB", max_size=5))
def test_a_value_is_not_expanded_again(text: str, value: str) -> None:
    assert expanded(f"[$(A)]{'x' * len(text)}", {"A": value}) == f"[{value}]{'x' * len(text)}"
