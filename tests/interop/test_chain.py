"""The whole chain as a user meets it: manifests applied with the real kubectl to a running process, as container and in a VM."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from api_support import eventually
from node_support import Node, http_get, pod

NGINX = "nacre.local/nginx:demo"
BUSYBOX = "nacre.local/busybox:demo"

ENDS_S = 8
COUNTER = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done"


def test_nginx_serves_from_its_pods_address(node: Node, handler: str) -> None:
    name = f"nginx-{handler or 'runc'}"
    before = node.traces()
    listens = {"readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1}}
    node.apply(pod(name, NGINX, handler=handler, container=listens))
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


def test_exec_into_what_does_not_run_says_so_whatever_protocol_kubectl_tries_last(node: Node) -> None:
    node.apply(pod("unstarted", BUSYBOX, "no-such-command"))
    done = node.nacre("kubectl", "exec", "unstarted", "--", "true", check=False)
    assert done.returncode != 0 and "SPDY" not in done.stderr, done.stderr
    assert 'find container "main" of pod default/unstarted: container not found' in done.stderr, done.stderr
    node.kubectl("delete", "pod", "unstarted", "--now")


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


def test_a_killed_daemon_costs_no_request_and_no_line(node: Node, handler: str) -> None:
    kind = handler or "runc"
    counter = {"name": "counter", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", COUNTER]}
    listens = {"readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1}}
    manifest = pod(f"survivor-{kind}", NGINX, handler=handler, container=listens)
    manifest["spec"]["containers"].append(counter)  # type: ignore[index]
    node.apply(manifest)
    node.apply(pod(f"ends-{kind}", BUSYBOX, "sh", "-c", f"sleep {ENDS_S}; exit 9", handler=handler, restartPolicy="Never"))
    for name in (f"survivor-{kind}", f"ends-{kind}"):
        node.ready(name)
    with _asked_all_the_time(node.address(f"survivor-{kind}")) as failures:
        os.kill(node.daemon, signal.SIGKILL)
        _until_an_end_is_written(node)  # one pod's process ends while nobody watches
        node.nacre("up")
        node.kubectl("wait", f"pod/ends-{kind}", "--for=jsonpath={.status.phase}=Failed", "--timeout=30s")
    assert failures == []
    (ended,) = node.pod(f"ends-{kind}")["status"]["containerStatuses"]  # type: ignore[index]
    assert ended["state"]["terminated"]["exitCode"] == 9
    (one, _other) = node.pod(f"survivor-{kind}")["status"]["containerStatuses"]  # type: ignore[index]
    assert one["restartCount"] == 0
    lines = node.kubectl("logs", f"survivor-{kind}", "-c", "counter").splitlines()
    assert lines == [f"line {number}" for number in range(len(lines))] and len(lines) > 10
    node.kubectl("delete", "pod", f"survivor-{kind}", f"ends-{kind}", "--now")


def _until_an_end_is_written(node: Node) -> None:
    """A shim writes how its process ended, and nobody tells us that it has."""
    deadline = time.monotonic() + 3 * ENDS_S
    while not list(node.prefix.glob("run/nacre/pods/*/containers/*/exit.json")):
        assert time.monotonic() < deadline, "no process has ended"
        time.sleep(0.1)


@contextmanager
def _asked_all_the_time(address: str) -> Iterator[list[str]]:
    """What went wrong with HTTP requests, made one after the other for as long as the block lasts."""
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                if http_get(address)[0] != 200:
                    failures.append(f"{address}: not 200")
            except OSError as error:
                failures.append(f"{address}: {error}")

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield failures
    finally:
        over.set()
        asker.join()


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


def test_logs_are_followed_to_their_end_and_cut_as_asked(node: Node) -> None:
    script = "i=0; while [ $i -lt 20 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
    node.apply(pod("talker", BUSYBOX, "sh", "-c", script, restartPolicy="Never"))
    node.kubectl("wait", "pod/talker", "--for=jsonpath={.status.phase}=Running", "--timeout=30s")
    assert node.kubectl("logs", "-f", "talker").splitlines() == [f"line {number}" for number in range(20)]
    assert node.kubectl("logs", "talker", "--tail=2").splitlines() == ["line 18", "line 19"]
    assert node.kubectl("logs", "talker", "--limit-bytes=10") == "line 0\nlin"
    stamped = node.kubectl("logs", "talker", "--timestamps", "--tail=1").split(" ", 1)
    assert stamped[0].endswith("Z") and stamped[1] == "line 19\n"
    assert "previous terminated container" in node.kubectl("logs", "talker", "--previous", check=False)
    node.kubectl("delete", "pod", "talker")


def test_a_pod_past_its_deadline_fails_and_says_so_once(node: Node) -> None:
    node.apply(pod("late", BUSYBOX, "sleep", "1000", activeDeadlineSeconds=1, terminationGracePeriodSeconds=1))
    node.kubectl("wait", "pod/late", "--for=jsonpath={.status.reason}=DeadlineExceeded", "--timeout=30s")
    assert node.kubectl("get", "pod", "late", "-o", "jsonpath={.status.phase}") == "Failed"
    assert node.kubectl("events", "--for", "pod/late").count("Pod was active on the node longer than the specified deadline") == 1
    node.kubectl("delete", "pod", "late")


def test_a_follower_that_goes_away_leaves_no_file_open(node: Node) -> None:
    node.apply(pod("silent", BUSYBOX, "sleep", "1000"))
    node.ready("silent")

    def followed() -> int:
        found = 0
        for one in os.scandir(f"/proc/{node.daemon}/fd"):
            with suppress(FileNotFoundError):  # closed while we look
                found += "default_silent_" in os.readlink(one.path)
        return found

    with node.kubectl_stream("logs", "-f", "silent"), node.kubectl_stream("logs", "-f", "silent"):
        eventually(lambda: followed() == 2)
    eventually(lambda: followed() == 0)
    node.kubectl("delete", "pod", "silent", "--now")


def test_a_crashing_container_is_started_again_with_back_off_and_keeps_its_last_log(node: Node) -> None:
    node.apply(pod("crash", BUSYBOX, "sh", "-c", "echo tried; exit 3"))
    path = "{.status.containerStatuses[0].state.waiting.reason}"
    node.kubectl("wait", "pod/crash", f"--for=jsonpath={path}=CrashLoopBackOff", "--timeout=30s")
    (status,) = node.pod("crash")["status"]["containerStatuses"]  # type: ignore[index]
    assert status["restartCount"] == 1 and status["lastState"]["terminated"]["exitCode"] == 3
    assert node.kubectl("logs", "crash", "--previous") == "tried\n"
    assert "Back-off restarting failed container main in pod crash_default(" in node.kubectl("describe", "pod", "crash")
    node.kubectl("delete", "pod", "crash", "--now")


def test_init_containers_sidecars_and_hooks_keep_their_order(node: Node) -> None:
    say = "echo {} >> /shared/order"
    mount = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    image = {"image": BUSYBOX, "imagePullPolicy": "IfNotPresent"}
    serve = "trap 'echo sidecar ends >> /shared/order; exit 0' TERM; echo sidecar >> /shared/order; while :; do sleep 0.05; done"
    hooks = {"lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", say.format("postStart")]}}}}
    shared = node.prefix / "shared"
    shared.mkdir()
    node.apply(pod(
        "order", BUSYBOX, "sh", "-c", "while ! grep -q postStart /shared/order; do sleep 0.05; done; echo main >> /shared/order",
        restartPolicy="Never",
        container=mount | hooks,
        initContainers=[
            {"name": "first", "command": ["sh", "-c", say.format("first")]} | image | mount,
            {"name": "sidecar", "restartPolicy": "Always", "command": ["sh", "-c", serve]} | image | mount,
            {"name": "second", "command": ["sh", "-c", say.format("second")]} | image | mount,
        ],
        volumes=[{"name": "shared", "hostPath": {"path": str(shared)}}],
    ))  # fmt: skip
    node.kubectl("wait", "pod/order", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    node.kubectl("wait", "pod/order", "--for=condition=PodReadyToStartContainers=false", "--timeout=30s")
    order = (shared / "order").read_text().splitlines()
    assert order[0] == "first" and {*order[1:3]} == {"sidecar", "second"}
    assert order[3:] == ["postStart", "main", "sidecar ends"]
    node.kubectl("delete", "pod", "order")


def test_probes_decide_on_readiness_and_on_life(node: Node) -> None:
    script = "touch /tmp/ready /tmp/alive; sleep 1000"
    look = {"periodSeconds": 1, "failureThreshold": 1}
    node.apply(pod("probed", BUSYBOX, "sh", "-c", script, container={
        "readinessProbe": {"exec": {"command": ["test", "-e", "/tmp/ready"]}} | look,
        "livenessProbe": {"exec": {"command": ["test", "-e", "/tmp/alive"]}} | look,
    }))  # fmt: skip
    node.ready("probed")
    node.kubectl("exec", "probed", "--", "rm", "/tmp/ready")
    node.kubectl("wait", "pod/probed", "--for=condition=Ready=false", "--timeout=30s")
    node.kubectl("exec", "probed", "--", "rm", "/tmp/alive")
    node.kubectl("wait", "pod/probed", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "--timeout=30s")
    events = node.kubectl("describe", "pod", "probed")
    assert "Readiness probe failed" in events and "failed liveness probe, will be restarted" in events
    node.ready("probed")
    node.kubectl("delete", "pod", "probed", "--now")


def test_a_changed_config_map_is_seen_in_the_running_pod(node: Node) -> None:
    node.apply(pod("follower", BUSYBOX, "sleep", "1000", container={"volumeMounts": [{"name": "map", "mountPath": "/map"}]},
                   volumes=[{"name": "map", "configMap": {"name": "words"}}]))  # fmt: skip
    with node.kubectl_stream(
        "get", "events", "-w", "--field-selector=reason=FailedMount", "-o", "jsonpath={.message}{'\\n'}"
    ) as lines:
        assert 'configmap "words" not found' in next(lines)
    node.kubectl("create", "configmap", "words", "--from-literal=word=one")
    node.ready("follower", timeout_s=10)
    node.kubectl("patch", "configmap", "words", "-p", '{"data":{"word":"two"}}')
    wait = "for i in $(seq 100); do grep -q two /map/word && exit 0; sleep 0.05; done; exit 1"
    node.kubectl("exec", "follower", "--", "sh", "-c", wait)
    node.kubectl("delete", "pod", "follower", "--now")
    node.kubectl("delete", "configmap", "words")


def test_a_static_manifest_runs_and_is_shown_by_a_mirror_that_comes_back(node: Node) -> None:
    manifest = node.prefix / "etc/nacre/manifests/static.json"
    body = pod("static", BUSYBOX, "sleep", "1000")
    manifest.with_suffix(".new").write_text(json.dumps(body))
    manifest.with_suffix(".new").rename(manifest)
    (name,) = {f"static-{os.uname().nodename.lower()}"}
    node.kubectl("wait", "--for=create", f"pod/{name}", "--timeout=30s")
    node.ready(name)
    (before,) = node.pod(name)["status"]["containerStatuses"]  # type: ignore[index]
    node.kubectl("delete", "pod", name)
    node.kubectl("wait", "--for=create", f"pod/{name}", "--timeout=30s")
    node.ready(name)
    (after,) = node.pod(name)["status"]["containerStatuses"]  # type: ignore[index]
    assert after["containerID"] == before["containerID"], "the mirror is a picture: the pod itself went on"
    manifest.unlink()
    node.kubectl("wait", "--for=delete", f"pod/{name}", "--timeout=30s")


def test_trace_shows_the_document_at_each_joint(node: Node, kata: str) -> None:
    node.apply(pod("traced", BUSYBOX, "sleep", "1000", handler=kata))
    node.ready("traced")
    picture = node.nacre("trace", "traced", "--full").stdout
    for word in ("RunPodSandbox", "ociVersion", "qemu-system", "runtimeClassName"):
        assert word in picture
    node.kubectl("delete", "pod", "traced", "--now")
