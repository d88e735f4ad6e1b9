"""No field of a pod is silently stored: kubelet or controllers name it in their code, or the table of unsupported fields does."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nacre.api import schema, unsupported

SOURCES = Path(schema.DEFINITIONS).parents[1]
NOTHING_TO_DO = {  # field: why nothing has to look at it
    "spec.automountServiceAccountToken": "there are no token volumes to mount",
    "spec.enableServiceLinks": "there are no Services to link to",
    "spec.securityContext.fsGroupChangePolicy": "ownership is set each time, which either value allows",
    "spec.serviceAccount": "the older name of serviceAccountName",
    "spec.ephemeralContainers": "refused as a whole",
}


def _definitions() -> dict[str, Any]:
    with gzip.open(schema.DEFINITIONS, "rt") as file:
        found: dict[str, Any] = json.loads(file.readline())
        return found


def _named() -> set[str]:
    code = "".join(path.read_text() for part in ("kubelet", "controllers") for path in (SOURCES / part).glob("*.py"))
    return set(re.findall(r"[\"']([A-Za-z][A-Za-z-]*)[\"']", code))


def _unnamed(known: dict[str, Any], words: set[str], type_: str, path: str, above: frozenset[str]) -> Iterator[str]:
    table = {gap.path.removesuffix("[]") for gap in unsupported.POD}
    for name, kind in known[type_]["fields"].items():
        here, many = f"{path}.{name}", isinstance(kind, dict) and "list" in kind
        kind = kind["list"] if many else kind
        if here in table | NOTHING_TO_DO.keys() or (path == "spec.volumes[]" and name not in unsupported._SERVED):
            continue
        if name not in words:
            if not any(covered.startswith(f"{here}.") for covered in table):
                yield here
        elif isinstance(kind, dict) and "ref" in kind and kind["ref"] not in above:
            yield from _unnamed(known, words, kind["ref"], here + "[]" * many, above | {kind["ref"]})


def test_every_field_of_a_pods_spec_is_acted_on_or_answered_for() -> None:
    assert list(_unnamed(_definitions(), _named(), "io.k8s.api.core.v1.PodSpec", "spec", frozenset())) == []


@pytest.mark.parametrize(
    ("spec", "refused"),
    [
        ({"hostUsers": False}, ["spec.hostUsers"]),
        ({"hostUsers": True}, []),
        ({"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}, ["spec.securityContext.appArmorProfile.type"]),
        ({"securityContext": {"appArmorProfile": {"type": "Localhost", "localhostProfile": "x"}}}, []),
        (
            {"initContainers": [{"securityContext": {"procMount": "Unmasked"}}]},
            ["spec.initContainers[0].securityContext.procMount"],
        ),
        ({"containers": [{"securityContext": {"procMount": "Default"}}]}, []),
        ({"volumes": [{"name": "v", "secret": {"defaultUser": 7}}]}, ["spec.volumes[0].secret.defaultUser"]),
    ],
)
def test_a_value_that_would_not_be_had_is_refused_and_the_usual_one_is_not(spec: dict[str, Any], refused: list[str]) -> None:
    causes, _warnings = unsupported.judge("", "Pod", {"spec": spec})
    assert [cause.field for cause in causes] == refused
