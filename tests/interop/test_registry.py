"""Debian's docker-registry with a password: an image pushed by skopeo, pulled by a pod with imagePullSecrets and by digest."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from node_support import Node, pod

BUSYBOX = "nacre.local/busybox:demo"
USER, PASSWORD = "puller", "swordfish"
HTPASSWD = USER + ":$2b$04$CQpRsBQLcHAZJyHmUSghxuu2BlTZbYxvhtozl0G/VFU6gevbzDQ2q\n"
CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {place}/data}}}}
http: {{addr: "{address}"}}
auth: {{htpasswd: {{realm: test, path: {place}/htpasswd}}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """An image in a registry of the test's own."""

    address: str
    digest: str

    @property
    def tagged(self) -> str:
        return f"{self.address}/team/busybox:1"


@pytest.fixture(scope="module")
def pushed(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    place = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (place / "htpasswd").write_text(HTPASSWD)
    (place / "config.yml").write_text(CONFIG.format(place=place, address=address))
    command = ["docker-registry", "serve", str(place / "config.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as registry:
        try:
            assert registry.stderr is not None
            said = next(line for line in registry.stderr if "listening on" in line or "fatal" in line)
            assert "listening on" in said, said
            yield Pushed(address=address, digest=_push(node, place, address))
        finally:
            registry.kill()


def _push(node: Node, place: Path, address: str) -> str:
    node.nacre("image", "export", BUSYBOX, "-o", str(place / "image.tar"))
    target = f"docker://{address}/team/busybox:1"
    login = ["--dest-tls-verify=false", f"--dest-creds={USER}:{PASSWORD}", f"--digestfile={place}/digest"]
    subprocess.run(["skopeo", "--insecure-policy", "copy", *login, f"oci-archive:{place}/image.tar", target], check=True)
    return (place / "digest").read_text().strip()


def test_a_pod_with_a_pull_secret_runs_an_image_of_a_private_registry(node: Node, pushed: Pushed) -> None:
    login = [f"--docker-server={pushed.address}", f"--docker-username={USER}", f"--docker-password={PASSWORD}"]
    node.kubectl("create", "secret", "docker-registry", "pull", *login)
    secret = {"imagePullSecrets": [{"name": "pull"}], "restartPolicy": "Never", "container": {"imagePullPolicy": "Always"}}
    node.apply(pod("private", pushed.tagged, "echo", "pulled", **secret))
    node.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/private", "--timeout=60s")
    assert node.kubectl("logs", "private") == "pulled\n"
    assert re.search(
        r'Successfully pulled image "\S+" in \S+ .*Image size: \d+ bytes\.', node.kubectl("describe", "pod", "private")
    )
    (status,) = node.pod("private")["status"]["containerStatuses"]  # type: ignore[index]
    assert (status["image"], status["imageID"]) == (pushed.tagged, f"{pushed.address}/team/busybox@{pushed.digest}")
    node.kubectl("delete", "pod/private", "secret/pull")


def test_without_credentials_the_registrys_refusal_is_told(node: Node, pushed: Pushed) -> None:
    node.apply(pod("stranger", f"{pushed.address}/team/busybox:other", "true"))
    node.kubectl(
        "wait", "--for=jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImagePull", "pod/stranger", "--timeout=60s"
    )
    said = node.kubectl("describe", "pod", "stranger")
    assert f"{pushed.address}: no basic auth credentials" in said and "imagePullSecrets" in said, said
    node.kubectl("delete", "pod", "stranger", "--now")


def test_an_image_is_pulled_by_its_digest_and_a_missing_tag_is_named(node: Node, pushed: Pushed) -> None:
    named = f"{pushed.address}/team/busybox@{pushed.digest}"
    node.nacre("image", "pull", "--user", f"{USER}:{PASSWORD}", named)
    node.apply(pod("by-digest", named, "echo", "here", restartPolicy="Never", container={"imagePullPolicy": "Never"}))
    node.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/by-digest", "--timeout=60s")
    node.kubectl("delete", "pod", "by-digest")
    done = node.nacre("image", "pull", "--user", f"{USER}:{PASSWORD}", f"{pushed.address}/team/busybox:2", check=False)
    assert done.returncode and "team/busybox:2" in done.stderr and "not found" in done.stderr, done.stderr
