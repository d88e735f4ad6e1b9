"""A fresh machine's first pod: `nacre up`, then the example's manifest, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_support import BIN, REPOSITORY, Node, http_get, pod

EXAMPLE = REPOSITORY / "examples/nginx-kata.yaml"
LIMIT_S = 400  # a guest's first boot is emulated here, on a machine that others use as well


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    try:
        node.nacre("up")
        yield node
        node.nacre("down")
        assert node.traces().processes == () == node.traces().mounts
    finally:
        node.nacre("reset", "--yes", check=False)


def test_an_image_of_the_nodes_own_name_is_made_when_a_pod_first_asks_for_it(fresh: Node) -> None:
    fresh.apply(pod("first", "nacre.local/busybox:demo", "echo", "made here", restartPolicy="Never"))
    fresh.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/first", "--timeout=170s", timeout_s=180)
    assert fresh.kubectl("logs", "first") == "made here\n"
    assert 'Successfully pulled image "nacre.local/busybox:demo"' in fresh.kubectl("describe", "pod", "first")
    fresh.kubectl("delete", "pod", "first")
    said = fresh.nacre("image", "pull", "nacre.local/nonesuch:demo", check=False).stderr
    assert "nacre.local/busybox:demo" in said and "nacre image import" in said, said


@pytest.mark.slow
def test_packages_that_cannot_be_fetched_are_named_to_who_wanted_the_image(tmp_path: Path) -> None:
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NACRE_SOFTWARE": str(tmp_path / "soft")}
    command = [str(BIN / "nacre"), "--prefix", str(tmp_path), "image", "pull", "nacre.local/busybox:demo"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere, timeout=170, check=False)
    assert done.returncode and "apt-get" in done.stderr and "remedy: " in done.stderr, done.stderr


@pytest.mark.slow
def test_the_examples_manifest_alone_brings_up_its_virtual_machine_and_says_what_it_waits_for(fresh: Node) -> None:
    assert "runtimeclass.node.k8s.io/kata created" in fresh.kubectl("apply", "-f", str(EXAMPLE))
    fresh.kubectl("wait", "--for=condition=Ready", "pod/nginx-kata", f"--timeout={LIMIT_S}s", timeout_s=LIMIT_S + 10)
    assert http_get(fresh.address("nginx-kata"))[0] == 200
    assert fresh.kubectl("exec", "nginx-kata", "--", "uname", "-r").strip() != os.uname().release
    told = fresh.kubectl("describe", "pod", "nginx-kata")
    assert "Pod sandbox waits: building the guest of virtual machines, once on this machine" in told, told
    assert "FailedCreatePodSandBox" not in told and "eadline" not in told, told
    fresh.nacre("enable", "kata", timeout_s=LIMIT_S)
    assert "Warning" not in fresh.kubectl("apply", "-f", str(EXAMPLE))
    overhead = json.loads(fresh.kubectl("get", "runtimeclass", "kata", "-o", "json"))["overhead"]["podFixed"]
    assert {*overhead} == {"memory", "cpu"}
    fresh.kubectl("delete", "pod", "nginx-kata", "--now")
    (template,) = fresh.prefix.glob("var/lib/nacre/kata/template/*")
    before = template.stat().st_mtime_ns
    template.unlink()
    fresh.nacre("enable", "kata", timeout_s=LIMIT_S)
    assert template.stat().st_mtime_ns != before, "another template beside a daemon that has the older one"
    assert "pod/nginx-kata created" in fresh.kubectl("apply", "-f", str(EXAMPLE))
    fresh.ready("nginx-kata")
    fresh.kubectl("delete", "pod", "nginx-kata", "--now")


@pytest.mark.slow
def test_a_pod_that_is_deleted_while_the_guest_is_built_goes_at_once(fresh: Node) -> None:
    fresh.kubectl("apply", "-f", str(EXAMPLE))
    selector = "--field-selector=reason=PreparingSandbox"
    with fresh.kubectl_stream("get", "events", "-w", selector, "-o", "name") as lines:
        next(lines)
    began = time.monotonic()
    fresh.kubectl("delete", "pod", "nginx-kata", "--timeout=60s")
    assert time.monotonic() - began < 15
