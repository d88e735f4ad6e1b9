"""What a person does with kubectl, with the oldest and the newest one promised, against a real server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_support import Kubectl, Node, eventually, in_thread, kubectls, node_api, running

POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  containers:
  - name: web
    image: nginx
    ports: [{containerPort: 80}]
    resources: {limits: {memory: 64Mi, cpu: 500m}}
"""
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1", "labels": {"kubernetes.io/hostname": "n1"}},
    "status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "capacity": {"cpu": "2", "memory": "1Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        "nodeInfo": {
            "kubeletVersion": "v1.37.0",
            "osImage": "Debian",
            "kernelVersion": "6.1",
            "containerRuntimeVersion": "nacre://0",
        },
    },
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node")) as found:
        yield found


@pytest.fixture(params=["1.32", "1.37"])
def kubectl(request: pytest.FixtureRequest, node: Node, tmp_path: Path) -> Iterator[Kubectl]:
    """A kubectl in a namespace of its own, which is gone afterwards."""
    binary = kubectls().get(request.param)
    if binary is None:
        pytest.skip(f"kubectl {request.param} is not on this machine")
    name = f"t-{request.node.name.replace('[', '-').replace(']', '').replace('.', '').replace('_', '-').lower()}"[:63].rstrip("-")
    found = Kubectl(binary, node, tmp_path)
    found("create", "namespace", name)
    found("config", "view")
    bound = Kubectl(binary, node, tmp_path)
    plain = bound.command
    bound.command = lambda *words: plain("--namespace", name, *words)  # type: ignore[method-assign]
    bound.namespace = name  # type: ignore[attr-defined]
    yield bound
    found("delete", "namespace", name)
    assert name not in found("get", "namespaces")


@pytest.fixture
def worker(kubectl: Kubectl) -> Iterator[str]:
    """A Ready node without a kubelet."""
    kubectl("create", "-f", "-", stdin=json.dumps(NODE))
    yield "n1"
    kubectl("delete", "node", "n1")


def test_apply_creates_then_says_unchanged_then_configures(kubectl: Kubectl) -> None:
    assert kubectl("apply", "-f", "-", stdin=POD) == "pod/web created\n"
    assert kubectl("apply", "-f", "-", stdin=POD) == "pod/web unchanged\n"
    assert kubectl("apply", "-f", "-", stdin=POD.replace("app: web", "app: shop")) == "pod/web configured\n"
    assert kubectl("get", "pod", "web", "-o", "jsonpath={.metadata.labels.app}") == "shop"
    assert kubectl("apply", "-f", "-", stdin=POD.replace("image: nginx", "image: nginx:1.27")) == "pod/web configured\n"
    assert "unchanged" in kubectl("apply", "--dry-run=server", "-f", "-", stdin=POD.replace("image: nginx", "image: nginx:1.27"))


def test_a_list_is_applied_item_by_item_and_each_is_checked(kubectl: Kubectl) -> None:
    def listed(**more: object) -> str:
        items = [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}} for name in ("l1", "l2")
        ]
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": [items[0], items[1] | more]})

    assert kubectl("apply", "-f", "-", stdin=listed()) == "configmap/l1 created\nconfigmap/l2 created\n"
    assert kubectl("apply", "-f", "-", stdin=listed()) == "configmap/l1 unchanged\nconfigmap/l2 unchanged\n"
    assert 'unknown field "dat"' in kubectl.refused("apply", "-f", "-", stdin=listed(dat={"x": "y"}))


def test_every_output_form_of_get_prints(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=POD)
    table = kubectl("get", "pods").splitlines()
    assert table[0].split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert table[1].split()[:4] == ["web", "0/1", "Pending", "0"]
    wide = kubectl("get", "pods", "-o", "wide").splitlines()[0]
    assert wide.split("AGE")[1].split() == ["IP", "NODE", "NOMINATED", "NODE", "READINESS", "GATES"]
    assert kubectl("get", "pods", "-o", "name") == "pod/web\n"
    assert kubectl.json("get", "pods")["items"][0]["kind"] == "Pod"
    assert "containerPort: 80" in kubectl("get", "pod", "web", "-o", "yaml")
    assert kubectl("get", "pods", "-l", "app=web", "-o", "custom-columns=N:.metadata.name", "--no-headers") == "web\n"
    assert "No resources found" in kubectl.run("get", "pods", "-l", "app!=web").stderr
    assert "web" in kubectl("get", "pods", "--sort-by=.metadata.name")
    assert "web" in kubectl("get", "all")
    assert "web" in kubectl("get", "pods", "-A", "--field-selector=metadata.name=web")
    assert "field label not supported: spec.color" in kubectl.refused("get", "pods", "--field-selector=spec.color=red")


def test_get_watch_prints_a_row_for_each_change(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=POD)
    watching = subprocess.Popen(kubectl.command("get", "pods", "-w"), stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("NAME")
        assert "Pending" in watching.stdout.readline()
        kubectl("patch", "pod", "web", "--subresource=status", "-p", '{"status":{"phase":"Running"}}')
        assert "Running" in watching.stdout.readline()
        kubectl("delete", "pod", "web")
        assert watching.stdout.readline().startswith("web")
    finally:
        watching.kill()
        watching.communicate()


def test_configmap_secret_and_namespace_arrive_as_protobuf(kubectl: Kubectl) -> None:
    kubectl("create", "configmap", "settings", "--from-literal=colour=blue", "--from-literal=empty=")
    kubectl("create", "secret", "generic", "key", "--from-literal=password=hunter2")
    assert kubectl.json("get", "configmap", "settings")["data"] == {"colour": "blue", "empty": ""}
    assert kubectl("get", "secret", "key", "-o", "jsonpath={.data.password}") == "aHVudGVyMg=="
    assert kubectl("get", "secret", "key", "--no-headers").split()[:3] == ["key", "Opaque", "1"]
    assert "configmap/settings" in kubectl("create", "configmap", "settings", "--dry-run=client", "-o", "name")
    assert "already exists" in kubectl.refused("create", "configmap", "settings")


def test_label_annotate_and_the_patch_types(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=POD)
    kubectl("label", "pod", "web", "tier=front")
    kubectl("annotate", "pod", "web", "note=hello")
    kubectl("patch", "pod", "web", "-p", "{metadata: {labels: {x: y}}}")
    kubectl("patch", "pod", "web", "--type=json", "-p", '[{"op": "remove", "path": "/metadata/labels/x"}]')
    kubectl("patch", "pod", "web", "--type=merge", "-p", '{"metadata": {"labels": {"app": null}}}')
    meta = kubectl.json("get", "pod", "web")["metadata"]
    assert meta["labels"] == {"tier": "front"}
    assert meta["annotations"]["note"] == "hello"
    assert "not labeled" in kubectl("label", "pod", "web", "tier=front")


def test_what_may_not_change_in_a_pod_is_refused_in_kubernetes_words(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=POD)
    words = kubectl.refused("patch", "pod", "web", "-p", '{"spec":{"restartPolicy":"Never"}}')
    assert 'The Pod "web" is invalid: spec: Forbidden: pod updates may not change fields other than' in words
    assert "spec.restartPolicy" in words
    kubectl("patch", "pod", "web", "-p", '{"spec":{"containers":[{"name":"web","image":"nginx:2"}]}}')
    assert kubectl("get", "pod", "web", "-o", "jsonpath={.spec.containers[0].ports[0].containerPort}") == "80"


def test_a_mistyped_field_is_named(kubectl: Kubectl) -> None:
    unknown = kubectl.refused("create", "-f", "-", stdin=POD.replace("image:", "imagee:"))
    assert 'strict decoding error: unknown field "spec.containers[0].imagee"' in unknown
    wrong = kubectl.refused("create", "--validate=ignore", "-f", "-", stdin=POD.replace("image: nginx", "image: 7"))
    assert "cannot unmarshal number into Go struct field Container.spec.containers.image of type string" in wrong
    missing = kubectl.refused("create", "--validate=ignore", "-f", "-", stdin=POD.replace("image: nginx", "imagee: nginx"))
    assert 'The Pod "web" is invalid: spec.containers[0].image: Required value' in missing


def test_server_side_apply_tells_conflicts_and_takes_over_by_force(kubectl: Kubectl) -> None:
    kubectl("apply", "--server-side", "--field-manager=one", "-f", "-", stdin=POD)
    other = POD.replace("app: web", "app: shop")
    words = kubectl.refused("apply", "--server-side", "--field-manager=two", "-f", "-", stdin=other)
    assert 'conflict with "one": .metadata.labels.app' in words or 'conflict with "one" using v1: .metadata.labels.app' in words
    kubectl("apply", "--server-side", "--field-manager=two", "--force-conflicts", "-f", "-", stdin=other)
    kubectl("apply", "--server-side", "--field-manager=two", "-f", "-", stdin=other.replace(", labels: {app: shop}", ""))
    assert "labels" not in kubectl.json("get", "pod", "web")["metadata"]


def test_a_pod_is_scheduled_described_and_waited_for(kubectl: Kubectl, worker: str) -> None:
    kubectl("apply", "-f", "-", stdin=POD)
    eventually(lambda: kubectl("get", "pod", "web", "-o", "jsonpath={.spec.nodeName}") == worker)
    status = {"phase": "Running", "podIP": "10.118.0.9", "podIPs": [{"ip": "10.118.0.9"}]}
    status |= {"conditions": [{"type": "Ready", "status": "True"}]}
    one = {"name": "web", "ready": True, "restartCount": 0, "image": "nginx", "imageID": "", "started": True}
    status["containerStatuses"] = [one | {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]
    waiting = subprocess.Popen(
        kubectl.command("wait", "--for=condition=Ready", "pod/web", "--timeout=20s"), stdout=subprocess.PIPE
    )
    kubectl("patch", "pod", "web", "--subresource=status", "-p", json.dumps({"status": status}))
    assert waiting.communicate()[0] == b"pod/web condition met\n"
    assert kubectl("get", "pod", "web", "-o", "wide", "--no-headers").split()[1:3] == ["1/1", "Running"]
    described = eventually(lambda: (text := kubectl("describe", "pod", "web")) and "Scheduled" in text and text)
    assert f"Successfully assigned {kubectl.namespace}/web to {worker}" in described  # type: ignore[attr-defined]
    assert "default-scheduler" in kubectl("get", "events", "-o", "wide")
    assert "Scheduled" in kubectl("events", "--for", "pod/web")
    assert "Debian" in kubectl("describe", "node", worker)
    kubectl("delete", "pod", "web", "--wait=false")
    assert "Terminating" in kubectl("get", "pod", "web")
    kubectl("delete", "pod", "web", "--force", "--grace-period=0")
    assert "NotFound" in kubectl.refused("get", "pod", "web")


def test_a_pod_that_fits_nowhere_is_told_why(kubectl: Kubectl, worker: str) -> None:
    kubectl("apply", "-f", "-", stdin=POD.replace("64Mi", "64Gi"))
    words = "0/1 nodes are available: 1 Insufficient memory."
    eventually(lambda: words in kubectl("get", "events"))
    assert words in kubectl("get", "pod", "web", "-o", "jsonpath={.status.conditions[0].message}")


def test_a_runtime_class_gives_its_overhead_and_must_exist(kubectl: Kubectl) -> None:
    pod = POD.replace("spec:", "spec:\n  runtimeClassName: vm")
    assert 'pods "web" is forbidden: pod rejected: RuntimeClass "vm" not found' in kubectl.refused("apply", "-f", "-", stdin=pod)
    made = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "vm"}, "handler": "kata"}
    kubectl("create", "-f", "-", stdin=json.dumps(made | {"overhead": {"podFixed": {"memory": "40Mi"}}}))
    try:
        kubectl("apply", "-f", "-", stdin=pod)
        assert kubectl.json("get", "pod", "web")["spec"]["overhead"] == {"memory": "40Mi"}
        assert kubectl("apply", "-f", "-", stdin=pod) == "pod/web unchanged\n"
        assert "kata" in kubectl("get", "runtimeclass", "vm")
    finally:
        kubectl("delete", "runtimeclass", "vm")


def test_fields_not_acted_on_are_refused_or_warned_about_by_name(kubectl: Kubectl) -> None:
    gated = POD.replace("spec:", "spec:\n  schedulingGates: [{name: x}]")
    assert "spec.schedulingGates: Forbidden: not supported by this nacre" in kubectl.refused("apply", "-f", "-", stdin=gated)
    spread = POD.replace("spec:", "spec:\n  affinity: {podAntiAffinity: {}}")
    spread = spread.replace("podAntiAffinity: {}", "nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}")
    volumes = POD.replace("spec:", "spec:\n  volumes: [{name: d, nfs: {server: s, path: /}}]")
    assert "spec.volumes[0].nfs: Forbidden: not supported by this nacre" in kubectl.refused("apply", "-f", "-", stdin=volumes)
    assert kubectl.run("apply", "-f", "-", stdin=spread).returncode == 0


def test_explain_api_resources_and_version(kubectl: Kubectl) -> None:
    assert "Container image name" in kubectl("explain", "pod.spec.containers.image")
    assert "KIND:       RuntimeClass" in kubectl("explain", "runtimeclass")
    listed = kubectl("api-resources")
    assert all(name in listed for name in ("pods", "leases", "runtimeclasses", "serviceaccounts"))
    assert "v1.37.0+nacre" in kubectl("version")
    assert kubectl("get", "--raw", "/readyz") == "ok"


def test_a_new_namespace_has_its_account_and_ends_empty(kubectl: Kubectl) -> None:
    eventually(lambda: "default" in kubectl("get", "serviceaccounts"))
    eventually(lambda: "kube-root-ca.crt" in kubectl("get", "configmaps"))
    kubectl("delete", "serviceaccount", "default")
    eventually(lambda: "default" in kubectl.run("get", "serviceaccounts").stdout)
    assert 'namespaces "nowhere" not found' in kubectl.refused("create", "configmap", "x", "-n", "nowhere")
    assert "this namespace may not be deleted" in kubectl.refused("delete", "namespace", "default")


async def test_logs_and_exec_reach_the_node_and_come_back(kubectl: Kubectl, node: Node) -> None:
    async with node_api(node.pki) as (port, seen):
        document = json.loads(json.dumps(NODE))
        document["status"]["daemonEndpoints"] = {"kubeletEndpoint": {"Port": port}}
        await in_thread(kubectl, "create", "-f", "-", stdin=json.dumps(document))
        pod = POD.replace("spec:", "spec:\n  nodeName: n1")
        assert (await in_thread(kubectl, "create", "-f", "-", stdin=pod)).returncode == 0
        try:
            assert (await in_thread(kubectl, "logs", "web")).stdout == "first line\n"
            followed = (await in_thread(kubectl, "logs", "-f", "--tail=3", "web")).stdout
            assert len(followed) > 300_000
            assert "tailLines=3" in seen[-1]
            cut = await in_thread(kubectl, "logs", "--since=7s", "web")
            assert cut.returncode != 0, "half a log is no log"
            assert "EOF" in cut.stderr
            done = await in_thread(kubectl, "exec", "web", "--", "echo", "hello")
            assert (done.returncode, done.stdout) == (0, "echo hello\n"), done.stderr
            done = await in_thread(kubectl, "exec", "-i", "web", "--", "cat", stdin="shout\n" * 5000)
            assert done.stdout == "cat\n" + "SHOUT\n" * 5000, done.stderr
            failed = await in_thread(kubectl, "exec", "web", "--", "exit", "3")
            assert failed.returncode == 3
            assert "is not valid for pod web" in (await in_thread(kubectl, "logs", "web", "-c", "other")).stderr
        finally:
            await in_thread(kubectl, "delete", "pod", "web", "--force")
            await in_thread(kubectl, "delete", "node", "n1")


def test_a_node_that_cannot_be_reached_is_named(kubectl: Kubectl, worker: str) -> None:
    kubectl("apply", "-f", "-", stdin=POD.replace("spec:", f"spec:\n  nodeName: {worker}"))
    words = kubectl.refused("logs", "web")
    assert f'the kubelet of node "{worker}" cannot be reached: its status has no address or no kubelet port yet' in words
    kubectl("delete", "pod", "web", "--force")
