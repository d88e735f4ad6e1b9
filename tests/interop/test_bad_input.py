"""Bad input ends in a clear event, status and `nacre explain`, and leaves nothing on the host."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from node_support import Node, Traces, pod

BUSYBOX = "nacre.local/busybox:demo"
HUGE = b"more than fits " * (4 << 20)


@dataclass
class BadRegistry:
    """A registry on loopback whose images are each broken in one way, named by repository: absent, dropped, forged."""

    server: ThreadingHTTPServer
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def registry() -> Iterator[BadRegistry]:
    layer = b"not a tar, but never read whole" * 4096
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]}}
    ).encode()
    manifest, huge_manifest = _manifest(config, layer), _manifest(config, HUGE)

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            what = self.path.split("/")
            if "huge" in what:
                return self.huge(what)
            if "absent" in what:
                return self.answer(
                    404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}', "application/json"
                )
            if "manifests" in what:
                return self.answer(200, manifest, "application/vnd.oci.image.manifest.v1+json")
            if what[-1] == _digest(config):
                return self.answer(200, config, "application/octet-stream")
            if "blobs" in what and "forged" in what:
                return self.answer(200, b"x" * len(layer), "application/octet-stream")
            if "blobs" in what:
                self.send_response(200)
                self.send_header("Content-Length", str(len(layer)))
                self.end_headers()
                self.wfile.write(layer[:1000])
                self.close_connection = True
                return None
            return self.answer(200, b"{}", "application/json")

        def huge(self, what: list[str]) -> None:
            """An image whose one layer is larger than the disk of the test."""
            if "manifests" in what:
                return self.answer(200, huge_manifest, "application/vnd.oci.image.manifest.v1+json")
            if what[-1] == _digest(config):
                return self.answer(200, config, "application/octet-stream")
            if "blobs" in what:
                return self.answer(200, HUGE, "application/octet-stream")
            return self.answer(200, b"{}", "application/json")

        do_HEAD = do_GET

        def answer(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if kind.endswith("manifest.v1+json"):
                self.send_header("Docker-Content-Digest", _digest(body))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """The test's output is not an access log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield BadRegistry(server)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("repository", "words"),
    [("absent", ("not found", "absent")), ("dropped", ("dropped", "sha256:")), ("forged", ("verify", "sha256:"))],
    ids=["absent", "dropped-in-mid-layer", "wrong-digest"],
)
def test_an_image_that_cannot_be_had_says_why(node: Node, registry: BadRegistry, repository: str, words: tuple[str, ...]) -> None:
    before = node.traces()
    name = f"image-{repository}"
    node.apply(pod(name, f"{registry.name}/{repository}:1"))
    text = _explained(node, name, reason="ErrImagePull")
    assert "Failed to pull image" in node.kubectl("describe", "pod", name)
    for word in words:
        assert word in text.lower()
    _delete(node, name, before)


def test_a_command_that_does_not_exist_is_named(node: Node) -> None:
    before = node.traces()
    node.apply(pod("no-command", BUSYBOX, "/bin/no-such-command"))
    text = _explained(node, "no-command", reason="RunContainerError")
    assert "/bin/no-such-command" in text
    _delete(node, "no-command", before)


def test_a_command_that_does_not_exist_in_a_vm_is_named(node: Node, kata: str) -> None:
    before = node.traces()
    node.apply(pod("no-command-vm", BUSYBOX, "/bin/no-such-command", handler=kata))
    text = _explained(node, "no-command-vm", reason="RunContainerError")
    assert "/bin/no-such-command" in text
    _delete(node, "no-command-vm", before)


def test_a_memory_limit_too_small_to_start_is_named(node: Node) -> None:
    before = node.traces()
    node.apply(pod("tiny", BUSYBOX, "sleep", "1000", container={"resources": {"limits": {"memory": "64Ki"}}}))
    text = _explained(node, "tiny")
    assert "memory" in text.lower()
    _delete(node, "tiny", before)


def test_an_unknown_runtime_class_is_refused_at_the_door(node: Node) -> None:
    before = node.traces()
    said = node.kubectl("apply", "-f", "-", stdin=json.dumps(pod("classless", BUSYBOX, handler="nonesuch")), check=False)
    assert 'RuntimeClass "nonesuch" not found' in said
    assert node.traces() == before


def test_an_unknown_handler_lists_the_known_ones(node: Node) -> None:
    before = node.traces()
    node.apply({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "odd"}, "handler": "nonesuch"})
    node.apply(pod("odd", BUSYBOX, handler="odd"))
    text = _explained(node, "odd")
    assert "runtime handler nonesuch is not configured" in text and "runc" in text
    assert "FailedCreatePodSandBox" in node.kubectl("describe", "pod", "odd")
    _delete(node, "odd", before)
    node.kubectl("delete", "runtimeclass", "odd")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"command": ["true"], "comand": ["x"]}, 'unknown field "spec.containers[0].comand"'),
        ({"ports": [{"containerPort": "eighty"}]}, "containerPort"),
        ({"imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
    ],
    ids=["unknown", "mistyped", "unknown-value"],
)
def test_a_wrong_field_is_refused_by_name(node: Node, spoil: dict[str, object], words: str) -> None:
    before = node.traces()
    said = node.kubectl("apply", "-f", "-", stdin=json.dumps(pod("wrong", BUSYBOX, container=spoil)), check=False)
    assert words in said
    assert "NotFound" in node.kubectl("get", "pod", "wrong", check=False)
    assert node.traces() == before


def test_a_full_disk_is_named_with_its_size(tmp_path: Path, registry: BadRegistry) -> None:
    node = Node(tmp_path)
    data = tmp_path / "var/lib/nacre"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small", data], check=True)
    try:
        node.nacre("up")
        node.apply(pod("full", f"{registry.name}/huge:1"))
        text = _explained(node, "full", reason="ErrImagePull")
        assert "no space left on device" in text and "nacre image" in text
        node.kubectl("delete", "pod", "full", "--timeout=60s")
        left = sum(path.stat().st_size for path in (data / "images").rglob("*") if path.is_file())
        assert left < 1 << 20, "what was half written is gone"
        node.nacre("down")
    finally:
        node.nacre("reset", "--yes", check=False)
        subprocess.run(["umount", data], check=False)


def _explained(node: Node, name: str, reason: str = "") -> str:
    """What `nacre explain` says once the pod waits for a reason worth the name."""
    path = "{.status.containerStatuses[0].state.waiting.reason}"
    if reason:
        node.kubectl("wait", f"pod/{name}", f"--for=jsonpath={path}={reason}", "--timeout=60s")
    else:
        node.kubectl("wait", f"pod/{name}", "--for=condition=Ready=false", "--timeout=60s")
        _until_event(node, name)
    done = node.nacre("explain", name, check=False)
    return done.stdout + done.stderr


def _until_event(node: Node, name: str) -> None:
    """Wait, on a watch, for the pod's first warning."""
    selector = f"--field-selector=involvedObject.name={name},type=Warning"
    with node.kubectl_stream("get", "events", "--watch", selector, "-o", "name") as lines:
        next(lines)


def _delete(node: Node, name: str, before: Traces) -> None:
    node.kubectl("delete", "pod", name, "--timeout=60s")
    after = node.traces()
    for kind in ("mounts", "cgroups", "links", "rules", "processes", "files"):
        assert getattr(after, kind) == getattr(before, kind), kind


def _manifest(config: bytes, layer: bytes) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _digest(config), "size": len(config)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": _digest(layer), "size": len(layer)}],
    }
    return json.dumps(document).encode()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
