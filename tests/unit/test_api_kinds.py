"""The kinds' tables: columns in Kubernetes' words, defaults, what unsupported fields lead to, the page that shows it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nacre.api import coverage, kinds, unsupported
from nacre.api.kind import duration
from nacre.api.shape import Mistyped, Reader

NOW = datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
POD = kinds.require("", "v1", "pods")


def pod(*, spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    found = {"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"}}
    return found | {"spec": {"containers": [{"name": "c"}], **(spec or {})}, "status": {"phase": "Running", **status}}


def one(name: str = "c", **state: Any) -> dict[str, Any]:
    return {"name": name, "restartCount": 0, "ready": "running" in state, "state": state}


@pytest.mark.parametrize(
    ("thing", "ready", "word", "restarts"),
    [
        (pod(phase="Pending"), "0/1", "Pending", "0"),
        (pod(containerStatuses=[one(running={})]), "1/1", "Running", "0"),
        (pod(containerStatuses=[one(waiting={"reason": "CrashLoopBackOff"})]), "0/1", "CrashLoopBackOff", "0"),
        (pod(containerStatuses=[one(terminated={"exitCode": 3})]), "0/1", "ExitCode:3", "0"),
        (pod(phase="Succeeded", containerStatuses=[one(terminated={"exitCode": 0, "reason": "Completed"})]), "0/1", "Completed", "0"),
        (pod(phase="Failed", reason="Evicted"), "0/1", "Evicted", "0"),
        (
            pod(phase="Pending", spec={"initContainers": [{"name": "i"}, {"name": "j"}]},
                initContainerStatuses=[one("i", terminated={"exitCode": 0}), one("j", running={})]),
            "0/1", "Init:1/2", "0",
        ),
        (
            pod(phase="Pending", spec={"initContainers": [{"name": "i"}]}, initContainerStatuses=[one("i", terminated={"exitCode": 2})]),
            "0/1", "Init:ExitCode:2", "0",
        ),
        (
            pod(containerStatuses=[one(running={}) | {
                "restartCount": 3, "lastState": {"terminated": {"finishedAt": "2026-01-01T00:08:00Z"}}}]),
            "1/1", "Running", "3 (2m ago)",
        ),
    ],
)  # fmt: skip
def test_a_pods_row_says_what_kubectl_users_know(thing: dict[str, Any], ready: str, word: str, restarts: str) -> None:
    assert POD.row(thing, NOW)[1:5] == [ready, word, restarts, "10m"]


def test_a_pod_that_is_being_deleted_is_terminating() -> None:
    thing = pod(containerStatuses=[one(running={})])
    thing["metadata"]["deletionTimestamp"] = "2026-01-01T00:09:00Z"
    assert POD.row(thing, NOW)[2] == "Terminating"


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.resource)
def test_every_row_has_a_cell_for_each_column(kind: Any) -> None:
    assert len(kind.row({"metadata": {"name": "x"}}, NOW)) == len(kind.columns)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (200, "3m20s"), (3600, "60m"), (4 * 3600, "4h"), (4 * 3600 + 60, "4h1m"),
     (30 * 3600, "30h"), (3 * 86400 + 7200, "3d2h"), (400 * 86400, "400d"), (800 * 86400, "2y70d")],
)  # fmt: skip
def test_an_age_is_as_short_as_kubernetes_makes_it(seconds: int, words: str) -> None:
    assert duration(seconds) == words


def test_defaults_are_filled_in_once() -> None:
    thing: dict[str, Any] = {
        "spec": {"containers": [{"name": "c", "image": "nginx", "readinessProbe": {"httpGet": {"port": 80}}}]}
    }
    POD.defaults(thing)
    container = thing["spec"]["containers"][0]
    assert container["imagePullPolicy"] == "Always"
    assert container["readinessProbe"]["httpGet"] == {"port": 80, "path": "/", "scheme": "HTTP"}
    assert thing["spec"]["terminationGracePeriodSeconds"] == 30
    assert thing["status"]["qosClass"] == "BestEffort"
    before = repr(thing)
    POD.defaults(thing)
    assert repr(thing) == before


@pytest.mark.parametrize(
    ("image", "policy"),
    [("nginx", "Always"), ("nginx:1", "IfNotPresent"), ("r:5000/nginx", "Always"), ("nginx:latest", "Always"),
     ("nginx@sha256:" + "0" * 64, "IfNotPresent")],
)  # fmt: skip
def test_an_images_tag_decides_when_it_is_pulled(image: str, policy: str) -> None:
    thing: dict[str, Any] = {"spec": {"containers": [{"name": "c", "image": image}]}}
    POD.defaults(thing)
    assert thing["spec"]["containers"][0]["imagePullPolicy"] == policy


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"httpGet": {"port": "8080", "scheme": "HTTP"}}, "httpGet.port"),
        ({"httpGet": {"port": 80, "scheme": "HTTP", "httpHeaders": [{"name": "a b", "value": ""}]}}, "httpGet.httpHeaders[0]"),
        ({"httpGet": {"port": 80, "scheme": "FTP"}}, "httpGet.scheme"),
        ({"exec": {}}, "exec.command"),
        ({"tcpSocket": {"port": "x"}}, ""),
        ({"httpGet": {"port": "http", "scheme": "HTTPS", "httpHeaders": [{"name": "X-A", "value": "b c"}]}}, ""),
    ],
)
def test_a_probe_that_can_never_be_sent_is_refused_by_its_field(action: dict[str, Any], field: str) -> None:
    container = {
        "name": "c",
        "image": "i",
        "imagePullPolicy": "Always",
        "terminationMessagePolicy": "File",
        "livenessProbe": action,
    }
    found = POD.check({"spec": {"containers": [container], "restartPolicy": "Always", "dnsPolicy": "Default"}})
    assert [cause.field.removeprefix("spec.containers[0].livenessProbe.") for cause in found] == [field] * bool(field)


def test_every_unsupported_field_is_a_field_of_kubernetes() -> None:
    for (group, name), table in unsupported.TABLES.items():
        kind = next(kind for kind in kinds.KINDS if (kind.group, kind.name) == (group, name))
        for gap in table:
            fields = kind.structure.fields
            for part in gap.path.split("."):
                kind_of = fields[part.removesuffix("[]")]
                inner = kind_of.items if part.endswith("[]") else kind_of
                assert inner is not None, gap.path
                fields = inner.struct.fields if inner.word == "struct" else {}


def test_an_unsupported_field_is_named_with_its_place() -> None:
    thing = {"spec": {"containers": [{"name": "a"}, {"name": "b", "volumeDevices": [{}]}], "volumes": [{"name": "v", "nfs": {}}]}}
    causes, warnings = unsupported.judge("", "Pod", thing | {"metadata": {}})
    assert [cause.field for cause in causes] == ["spec.containers[1].volumeDevices", "spec.volumes[0].nfs"]
    assert warnings == []


def test_the_coverage_page_is_what_the_server_does() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
    assert page.read_text() == coverage.text(), "run python -m nacre.api.coverage > docs/coverage.md"


# ---- reading


def read(tree: Any) -> tuple[dict[str, Any], list[str]]:
    reader = Reader()
    return reader.read(tree, POD.structure), reader.strict


def test_reading_drops_what_is_unknown_null_or_empty_and_settles_quantities() -> None:
    tree = {"metadata": {"labels": {}, "annotations": None, "colour": 1}, "spec": {"containers": [{"args": []}], "x": 1}}
    tree["spec"]["containers"][0]["resources"] = {"limits": {"memory": "1024Mi", "cpu": 0.5}}  # type: ignore[index]
    found, strict = read(tree)
    assert found == {"metadata": {}, "spec": {"containers": [{"resources": {"limits": {"memory": "1Gi", "cpu": "500m"}}}]}}
    assert strict == ['unknown field "metadata.colour"', 'unknown field "spec.x"']


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"spec": 3}, "json: cannot unmarshal number into Go struct field Pod.spec of type v1.PodSpec"),
        (
            {"spec": {"containers": {}}},
            "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
        ),
        (
            {"spec": {"hostNetwork": "yes"}},
            "json: cannot unmarshal string into Go struct field PodSpec.spec.hostNetwork of type bool",
        ),
        ({"spec": {"containers": [{"resources": {"limits": {"cpu": "x"}}}]}}, "quantities must match the regular expression"),
        (
            {"metadata": {"labels": {"a": 1}}},
            "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string",
        ),
        ([], "json: cannot unmarshal array into Go value of type v1.Pod"),
    ],
)
def test_a_wrong_type_is_told_in_kubernetes_words(tree: Any, words: str) -> None:
    with pytest.raises(Mistyped) as caught:
        read(tree)
    assert words in str(caught.value)
