"""The whole chain as a user meets it: manifests applied with the real kubectl to a running process, as container and in a VM."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from node_support import Node, http_get, pod

NGINX = "nacre.local/nginx:demo"
BUSYBOX = "nacre.local/busybox:demo"

COUNTER = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done"


def test_nginx_serves_from_its_pods_address(node: Node, handler: str) -> None:
    name = f"nginx-{handler or 'runc'}"
    before = node.traces()
    node.apply(pod(name, NGINX, handler=handler))
    node.ready(name)
    status, body = http_get(node.address(name))
    assert status == 200 and b"nacre" in body
    assert "GET /" in node.kubectl("logs", name)
    kernel = node.kubectl("exec", name, "--", "uname", "-r").strip()
    assert (kernel != os.uname().release) == bool(handler)
    node.kubectl("delete", "pod", name)
    assert node.traces() == before


def test_exit_codes_streams_and_termination_are_true(node: Node, handler: str) -> None:
    name = f"codes-{handler or 'runc'}"
    command = ("sh", "-c", "echo out; echo err >&2; echo last words > /dev/termination-log; exit 7")
    node.apply(pod(name, BUSYBOX, *command, handler=handler, restartPolicy="Never"))
    node.kubectl("wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s")
    assert sorted(node.kubectl("logs", name).splitlines()) == ["err", "out"]
    (status,) = node.pod(name)["status"]["containerStatuses"]  # type: ignore[index]
    ended = status["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (7, "Error", "last words\n")
    node.kubectl("delete", "pod", name)


def test_exec_gives_streams_and_exit_code(node: Node, handler: str) -> None:
    name = f"exec-{handler or 'runc'}"
    node.apply(pod(name, BUSYBOX, "sleep", "1000", handler=handler))
    node.ready(name)
    done = node.nacre("kubectl", "exec", name, "--", "sh", "-c", "echo out; echo err >&2; exit 3", check=False)
    assert (done.stdout, done.returncode) == ("out\n", 3) and "err\n" in done.stderr
    assert node.kubectl("exec", "-i", name, "--", "wc", "-c", stdin="x" * 300_000).strip() == "300000"
    node.kubectl("delete", "pod", name, "--now")


def test_volumes_and_environment_come_from_the_api(node: Node, handler: str) -> None:
    name = f"volumes-{handler or 'runc'}"
    node.kubectl("create", "configmap", f"{name}-map", "--from-literal=greeting=hello")
    node.kubectl("create", "secret", "generic", f"{name}-secret", "--from-literal=word=swordfish")
    mounts = [
        {"name": "map", "mountPath": "/map"},
        {"name": "secret", "mountPath": "/secret"},
        {"name": "scratch", "mountPath": "/scratch"},
    ]
    volumes = [
        {"name": "map", "configMap": {"name": f"{name}-map"}},
        {"name": "secret", "secret": {"secretName": f"{name}-secret"}},
        {"name": "scratch", "emptyDir": {}},
    ]
    env = [
        {"name": "FROM_MAP", "valueFrom": {"configMapKeyRef": {"name": f"{name}-map", "key": "greeting"}}},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    script = "cat /map/greeting /secret/word; echo; echo $FROM_MAP $POD; echo kept > /scratch/file; cat /scratch/file"
    node.apply(pod(name, BUSYBOX, "sh", "-c", script, handler=handler, restartPolicy="Never", volumes=volumes,
                   container={"volumeMounts": mounts, "env": env}))  # fmt: skip
    node.kubectl("wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    assert node.kubectl("logs", name) == f"helloswordfish\nhello {name}\nkept\n"
    node.kubectl("delete", "pod", name)


def test_a_killed_daemon_costs_no_request_and_no_line(node: Node) -> None:
    pods = [f"survivor-{handler or 'runc'}" for handler in HANDLERS]
    for name, handler in zip(pods, HANDLERS, strict=True):
        counter = {"name": "counter", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", COUNTER]}
        manifest = pod(name, NGINX, handler=handler)
        manifest["spec"]["containers"].append(counter)  # type: ignore[index]
        node.apply(manifest)
    node.apply(pod("ends", BUSYBOX, "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 9", restartPolicy="Never"))
    for name in (*pods, "ends"):
        node.ready(name)
    addresses = [node.address(name) for name in pods]
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            for address in addresses:
                try:
                    if http_get(address)[0] != 200:
                        failures.append(f"{address}: not 200")
                except OSError as error:
                    failures.append(f"{address}: {error}")

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        (root,) = {Path(f"/proc/{pid}/root") for pid in _processes_running("while [ ! -e /tmp/go ]")}
        os.kill(node.daemon, signal.SIGKILL)
        (root / "tmp/go").touch()  # one pod's process ends while nobody watches
        node.nacre("up")
        node.kubectl("wait", "pod/ends", "--for=jsonpath={.status.phase}=Failed", "--timeout=30s")
    finally:
        over.set()
        asker.join()
    assert failures == []
    (status,) = node.pod("ends")["status"]["containerStatuses"]  # type: ignore[index]
    assert status["state"]["terminated"]["exitCode"] == 9
    for name in pods:
        lines = node.kubectl("logs", name, "-c", "counter").splitlines()
        assert lines == [f"line {number}" for number in range(len(lines))] and len(lines) > 10
        node.kubectl("delete", "pod", name, "--now")
    node.kubectl("delete", "pod", "ends", "--now")


def test_apply_watch_and_delete_agree(node: Node) -> None:
    manifest = pod("watched", BUSYBOX, "sleep", "1000")
    seen = []
    with node.kubectl_stream("get", "pods", "-w", "--output-watch-events", "--field-selector=metadata.name=watched") as lines:
        node.apply(manifest)
        node.ready("watched")
        (before,) = node.pod("watched")["status"]["containerStatuses"]  # type: ignore[index]
        assert "unchanged" in node.apply(manifest)
        manifest["metadata"]["labels"] = {"colour": "green"}  # type: ignore[index]
        assert "configured" in node.apply(manifest)
        assert "watched" in node.kubectl("get", "pods", "-l", "colour=green")
        (after,) = node.pod("watched")["status"]["containerStatuses"]  # type: ignore[index]
        assert after == before, "a label restarts nothing"
        node.kubectl("delete", "pod", "watched", "--now")
        for line in lines:
            seen.append(line.split()[0])
            if seen[-1] == "DELETED":
                break
    assert seen[:2] == ["EVENT", "ADDED"] and seen[-1] == "DELETED" and "MODIFIED" in seen


def test_trace_shows_the_document_at_each_joint(node: Node) -> None:
    node.apply(pod("traced", BUSYBOX, "sleep", "1000", handler="kata"))
    node.ready("traced")
    picture = node.nacre("trace", "traced").stdout
    for word in ("RunPodSandbox", "ociVersion", "qemu-system", "runtimeClassName"):
        assert word in picture
    node.kubectl("delete", "pod", "traced", "--now")


def _processes_running(words: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if command.startswith("sh -c " + words):
                found.append(int(entry.name))
    return found
