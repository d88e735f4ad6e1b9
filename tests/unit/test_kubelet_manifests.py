"""Static manifests: files that a person wrote, read without the API server's checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from nacre.kubelet.manifests import static_pod
from nacre.oci.errors import Invalid

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\n"


def test_dates_are_the_text_that_they_are(tmp_path: Path) -> None:
    path = tmp_path / "web.yaml"
    path.write_text(POD + "spec: {containers: [{name: c, image: i, env: [{name: SINCE, value: 2020-01-01}]}]}\n")
    pod = static_pod(str(path), "n1")
    assert pod["spec"]["containers"][0]["env"][0]["value"] == "2020-01-01"
    assert (pod["metadata"]["name"], pod["spec"]["nodeName"]) == ("web-n1", "n1")


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("spec: {containers: [5]}", r"spec\.containers\[0\] has no name or no image"),
        ("spec: {containers: [{name: c}]}", r"spec\.containers\[0\]"),
        ("spec: {containers: [{name: c, image: i}], initContainers: [{image: i}]}", r"spec\.initContainers\[0\]"),
        ("spec: {containers: []}", "containers is missing"),
        ("spec: [", "it is no YAML"),
        ("x: !!int y", "it is no YAML"),
        ("x: !!bool y", "it is no YAML"),
        ("x: &a [*a]", "containers is missing|spec"),
        ("spec: {containers: [{name: c, image: i, envFrom: [{secretRef: {name: s}}]}]}", "may not refer to Secret s"),
    ],
)
def test_what_is_no_static_pod_is_said_to_be_none(tmp_path: Path, rest: str, words: str) -> None:
    path = tmp_path / "web.yaml"
    path.write_text(POD + rest + "\n")
    with pytest.raises(Invalid, match=words):
        static_pod(str(path), "n1")
