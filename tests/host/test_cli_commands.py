"""The commands as a user types them, on one real node with a pod that runs and one that cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from machine import BIN, Machine, machine

from nacre.cli import archive, proof_image

IMAGE = "nacre.local/shell:test"
SECRET = "hush-hush-9d1f"


def pod(name: str, *words: str) -> str:
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": list(words),
        "env": [{"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}}],
    }
    spec = {"terminationGracePeriodSeconds": 1, "containers": [container]}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    place = tmp_path_factory.mktemp("commands")
    (place / "mounts").mkdir()
    (place / "node").mkdir()
    with machine(place / "node", place / "mounts") as made:
        path = str(place / "shell.tar")
        archive.write(path, [IMAGE], proof_image.layer(), entrypoint=[proof_image.SHELL], made_by="a test")
        made.nacre("image", "import", path)
        made.nacre("up")
        made.nacre("kubectl", "create", "secret", "generic", "key", f"--from-literal=k={SECRET}")
        made.nacre("kubectl", "apply", "-f", "-", stdin=pod("good", "/bin/sh", "-c", "while :; do read line < /dev/zero; done"))
        made.nacre("kubectl", "apply", "-f", "-", stdin=pod("typo", "/bin/shh"))
        made.ready("good")
        made.nacre(
            "kubectl", "wait", "pod/typo", "--for=jsonpath={.status.containerStatuses[0].state.waiting.reason}", "--timeout=20s"
        )
        yield made


def test_status_says_ready_and_where_everything_is(node: Machine) -> None:
    said = node.nacre("status", "--wait-ready").stdout
    assert "is Ready" in said and "cri, api, controllers, kubelet" in said and f"{node.prefix}/etc/nacre/admin.conf" in said
    assert json.loads(node.nacre("status", "-o", "json").stdout)["ready"] is True


def test_up_again_says_that_it_is_up(node: Machine) -> None:
    assert "The node is up already" in node.nacre("up").stdout


def test_explain_names_the_first_cause_and_the_remedy(node: Machine) -> None:
    said = node.nacre("explain", "typo").stdout
    assert "first cause" in said and "/bin/shh" in said and "remedy" in said
    verdict = json.loads(node.nacre("explain", "default/typo", "-o", "json").stdout)
    assert verdict["cause"]["code"] == "CommandNotFound" and verdict["running"] is False
    assert json.loads(node.nacre("explain", "good", "-o", "json").stdout)["running"] is True


def test_a_pod_that_is_not_there_is_one_sentence(node: Machine) -> None:
    for command in ("explain", "trace"):
        refused = node.nacre(command, "nosuch", check=False)
        assert refused.returncode == 1
        assert refused.stderr.splitlines() == [
            'error: find pod default/nosuch: pods "nosuch" not found',
            "remedy: nacre kubectl get pods -A",
        ]


def test_trace_has_every_joint_of_a_container_pod_and_no_secret(node: Machine) -> None:
    text = node.nacre("trace", "good", "--full").stdout
    order = [text.index(words) for words in ("Kubernetes API", "RunPodSandbox", "ociVersion", "StartContainer")]
    assert order[0] < order[1] < order[2] and order[1] < order[3]
    records = [json.loads(line) for line in node.nacre("trace", "good", "-o", "json").stdout.splitlines()]
    assert {"api", "cri", "oci"} <= {record["joint"] for record in records}
    (document,) = [
        json.loads(line)["document"] for line in node.nacre("trace", "good", "--joint", "oci", "-o", "json").stdout.splitlines()
    ]
    assert document["process"]["args"][0] == "/bin/sh"


def test_logs_are_the_daemons_own_by_component(node: Machine) -> None:
    assert " is up after " in node.nacre("logs", "node").stdout
    assert node.nacre("logs", "kubelet", "-n", "3").stdout.count("\n") <= 3
    follow = [
        "nsenter",
        "-t",
        str(node.pid),
        "-n",
        "-m",
        str(BIN / "nacre"),
        "--prefix",
        str(node.prefix),
        "logs",
        "-f",
        "-n",
        "1",
    ]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.terminate()


def test_the_kubeconfig_is_printed_and_merged_beside_what_is_there(node: Machine, tmp_path: Path) -> None:
    printed = yaml.safe_load(node.nacre("config").stdout)
    assert printed["clusters"][0]["cluster"]["server"].startswith("https://127.0.0.1:")
    target = tmp_path / "config"
    other = {"name": "work", "cluster": {"server": "https://work.example"}}
    target.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "clusters": [other], "current-context": "work"}))
    for _again in range(2):
        node.nacre("config", "--merge", KUBECONFIG=str(target))
    merged = yaml.safe_load(target.read_text())
    assert other in merged["clusters"] and len(merged["clusters"]) == 2 and merged["current-context"].startswith("nacre")
    listed = node.run("kubectl", "--kubeconfig", str(target), "get", "pods", "-o", "name").stdout
    assert "pod/good" in listed


def test_inspect_packs_what_helps_and_masks_secrets(node: Machine, tmp_path: Path) -> None:
    target = tmp_path / "inspect.tar.gz"
    node.nacre("inspect", "-o", str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as packed:
        contents = {member.name: packed.extractfile(member).read() for member in packed.getmembers()}  # type: ignore[union-attr]
    names = set(contents)
    assert {f"nacre-inspect/{name}" for name in ("doctor.json", "host.json", "logs/node.log", "api/pods.json")} <= names
    assert any(name.startswith("nacre-inspect/trace/") for name in names)
    assert [name for name, content in contents.items() if SECRET.encode() in content] == []
    assert [item["metadata"]["name"] for item in json.loads(contents["nacre-inspect/api/pods.json"])["items"]] == ["good", "typo"]


def test_addons_lists_kata_as_off_and_an_unknown_one_is_named(node: Machine) -> None:
    assert "kata" in node.nacre("addons").stdout and " off " in node.nacre("addons").stdout
    refused = node.nacre("enable", "nothing", check=False)
    assert refused.returncode == 1 and "known are kata" in refused.stderr


def test_a_daemon_that_was_killed_is_replaced_and_the_pod_goes_on(node: Machine) -> None:

    status = json.loads(node.nacre("status", "-o", "json").stdout)
    container = node.nacre("kubectl", "get", "pod", "good", "-o", "jsonpath={.status.containerStatuses[0].containerID}").stdout
    os.kill(status["pid"], signal.SIGKILL)
    assert "no daemon" in node.nacre("status", check=False).stderr
    assert "its pods are taken over" in node.nacre("up").stdout
    node.nacre("status", "--wait-ready")
    again = node.nacre(
        "kubectl", "get", "pod", "good", "-o", "jsonpath={.status.containerStatuses[0].containerID} {.status.phase}"
    ).stdout
    assert again == f"{container} Running"
