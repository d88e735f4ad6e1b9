"""A pod as CRI messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nacre.config import Config
from nacre.kubelet import resources, translate
from nacre.kubelet.expand import ConfigError, Sources
from nacre.kubelet.volumes import PodVolumes
from nacre.wire import cri_pb2 as cri

CONTAINER: dict[str, Any] = {"name": "main", "image": "web:1"}


def pod(container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "web", "namespace": "shop", "uid": "u1", "labels": {"app": "web"}}
    return {"metadata": metadata, "spec": {"containers": [CONTAINER | (container or {})]} | spec}


@pytest.fixture
def frame(tmp_path: Path) -> translate.Frame:
    config = Config(prefix=str(tmp_path), node_name="node1")
    volumes = PodVolumes(config.kubelet_dir, "u1")
    Path(volumes.directory).mkdir(parents=True)
    return translate.Frame(config=config, volumes=volumes, cgroup_parent="/nacre/kubepods/podu1", node_memory=1 << 30)


def container_config(thing: dict[str, Any], frame: translate.Frame, attempt: int = 0) -> Any:
    sources = Sources(thing, {}, {})
    return translate.container_config(thing, thing["spec"]["containers"][0], attempt, "sha256:1", sources, frame)


def test_a_sandbox_carries_what_a_later_kubelet_knows_it_by(frame: translate.Frame) -> None:
    config = translate.sandbox_config(pod(), 2, frame)
    assert config.labels[translate.UID_LABEL] == "u1" and config.labels["app"] == "web"
    assert (config.metadata.name, config.metadata.attempt, config.hostname) == ("web", 2, "web")
    assert config.linux.cgroup_parent == "/nacre/kubepods/podu1"


def test_host_namespaces_are_the_node_s_and_shared_ones_the_pod_s(frame: translate.Frame) -> None:
    shared = translate.sandbox_config(pod(shareProcessNamespace=True), 0, frame).linux.security_context.namespace_options
    assert (shared.network, shared.pid, shared.ipc) == (cri.POD, cri.POD, cri.POD)
    config = translate.sandbox_config(pod(hostNetwork=True, hostPID=True, hostIPC=True), 0, frame)
    hosts = config.linux.security_context.namespace_options
    assert (hosts.network, hosts.pid, hosts.ipc, config.hostname) == (cri.NODE, cri.NODE, cri.NODE, "")


def test_host_ports_and_dns_settings_reach_the_sandbox(frame: translate.Frame) -> None:
    ports = {"ports": [{"containerPort": 80, "hostPort": 8080, "protocol": "TCP"}, {"containerPort": 81}]}
    asked = {
        "nameservers": ["192.0.2.53"],
        "searches": ["shop.local"],
        "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
    }
    config = translate.sandbox_config(pod(ports, dnsPolicy="None", dnsConfig=asked), 0, frame)
    (port,) = config.port_mappings
    assert (port.container_port, port.host_port) == (80, 8080)
    assert (list(config.dns_config.servers), list(config.dns_config.options)) == (["192.0.2.53"], ["ndots:2", "edns0"])


def test_what_a_pod_asks_of_groups_profiles_and_mounts_reaches_the_container(frame: translate.Frame) -> None:
    named = {"appArmorProfile": {"type": "Localhost", "localhostProfile": "strict"}}
    mounts = [
        {"name": "v", "mountPath": f"/{kind}", "readOnly": True, "recursiveReadOnly": kind} for kind in ("Enabled", "Disabled")
    ]
    asked = pod({"securityContext": named, "volumeMounts": mounts}, securityContext={"supplementalGroupsPolicy": "Strict"})
    config = container_config(asked | {"spec": asked["spec"] | {"volumes": [{"name": "v", "hostPath": {"path": "/srv"}}]}}, frame)
    security = config.linux.security_context
    assert (security.apparmor.profile_type, security.apparmor.localhost_ref) == (cri.SecurityProfile.Localhost, "strict")
    assert security.supplemental_groups_policy == cri.Strict
    assert [mount.recursive_read_only for mount in config.mounts[:2]] == [True, False]
    assert not container_config(pod(), frame).linux.security_context.HasField("apparmor")


def test_commands_see_the_environment(frame: translate.Frame) -> None:
    words = {"command": ["echo", "$(WHO)"], "args": ["$(MISSING)"], "env": [{"name": "WHO", "value": "you"}]}
    config = container_config(pod(words), frame)
    assert (list(config.command), list(config.args)) == (["echo", "you"], ["$(MISSING)"])
    assert [(pair.key, pair.value) for pair in config.envs] == [("WHO", b"you")]


def test_limits_become_what_the_kernel_is_told(frame: translate.Frame) -> None:
    asked = {"resources": {"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "250m", "memory": "64Mi"}}}
    limits = container_config(pod(asked), frame).linux.resources
    assert (limits.cpu_quota, limits.cpu_period, limits.cpu_shares, limits.memory_limit_in_bytes) == (
        50_000,
        100_000,
        256,
        64 << 20,
    )
    assert limits.oom_score_adj == 1000 - 1000 * 64 // 1024


def test_every_mount_states_its_meaning_for_runtimes_that_cannot_bind(frame: translate.Frame) -> None:
    mounts = [{"name": "scratch", "mountPath": "/scratch"}, {"name": "map", "mountPath": "/map", "readOnly": True}]
    volumes = [
        {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "map", "configMap": {"name": "m"}},
    ]
    config = container_config(pod({"volumeMounts": mounts}, volumes=volumes), frame)
    meanings = {one["destination"]: one for one in json.loads(config.annotations[translate.MOUNTS_ANNOTATION])}
    assert {mount.container_path for mount in config.mounts} == set(meanings)
    scratch = meanings["/scratch"]
    assert (scratch["type"], scratch["medium"], scratch["size_bytes"]) == ("emptyDir", "Memory", 1 << 20)
    assert meanings["/map"] == {"destination": "/map", "type": "configMap", "name": "map"}
    assert meanings["/dev/termination-log"]["type"] == "file"
    assert {mount.container_path: mount.readonly for mount in config.mounts}["/map"]


def test_a_sub_path_is_resolved_beneath_its_volume(frame: translate.Frame, tmp_path: Path) -> None:
    (tmp_path / "vol/in").mkdir(parents=True)
    (tmp_path / "vol/out").symlink_to("/etc")
    volumes = [{"name": "v", "hostPath": {"path": str(tmp_path / "vol")}}]

    def mounted(below: str) -> Any:
        mount = [{"name": "v", "mountPath": "/v", "subPath": below}]
        return container_config(pod({"volumeMounts": mount}, volumes=volumes), frame).mounts[0].host_path

    assert mounted("in") == str(tmp_path / "vol/in")
    assert mounted("made/deep") == str(tmp_path / "vol/made/deep") and (tmp_path / "vol/made/deep").is_dir()
    for wrong in ("../x", "/etc", "out/passwd"):
        with pytest.raises(ConfigError):
            mounted(wrong)


def test_security_settings_of_the_container_win_over_the_pod_s(frame: translate.Frame) -> None:
    own = {"securityContext": {"runAsUser": 5, "capabilities": {"drop": ["ALL"]}, "allowPrivilegeEscalation": False}}
    of_pod = {"runAsUser": 1, "runAsGroup": 2, "fsGroup": 7, "supplementalGroups": [8]}
    context = container_config(pod(own, securityContext=of_pod), frame).linux.security_context
    assert (context.run_as_user.value, context.run_as_group.value, sorted(context.supplemental_groups)) == (5, 2, [7, 8])
    assert context.no_new_privs and list(context.capabilities.drop_capabilities) == ["ALL"]
    assert context.seccomp.profile_type == cri.SecurityProfile.RuntimeDefault


@pytest.mark.parametrize(
    ("context", "image", "words"),
    [
        ({"runAsNonRoot": True}, cri.Image(uid=cri.Int64Value(value=0)), "image will run as root"),
        ({"runAsNonRoot": True}, cri.Image(username="web"), r"non-numeric user \(web\)"),
        ({"runAsNonRoot": True, "runAsUser": 0}, cri.Image(), "breaks non-root policy"),
    ],
)
def test_run_as_non_root_is_refused_in_kubernetes_words(context: dict[str, Any], image: Any, words: str) -> None:
    thing = pod({"securityContext": context})
    with pytest.raises(ConfigError, match=words):
        translate.check_non_root(thing, thing["spec"]["containers"][0], image)


def test_a_numeric_user_other_than_root_is_fine() -> None:
    thing = pod({"securityContext": {"runAsNonRoot": True}})
    translate.check_non_root(thing, thing["spec"]["containers"][0], cri.Image(uid=cri.Int64Value(value=101)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("100m", 0.1), ("1.5Gi", 1.5 * 2**30), ("2e3", 2000), ("64Mi", 64 * 2**20), ("1k", 1000), ("-1", -1)],
)
def test_quantities_are_read_as_kubernetes_writes_them(text: str, value: float) -> None:
    assert float(resources.quantity(text)) == value


def test_a_pod_has_a_limit_only_if_every_container_has_one() -> None:
    limited = {"resources": {"limits": {"memory": "64Mi"}}}
    both = {"containers": [CONTAINER | limited, CONTAINER | limited], "overhead": {"memory": "16Mi"}}
    assert resources.pod_totals(both)["memory"] == {"limit": 144 << 20}
    assert "memory" not in resources.pod_totals({"containers": [CONTAINER | limited, CONTAINER]})


def test_a_virtual_machine_that_nobody_weighed_has_no_limit_of_memory_as_a_whole() -> None:
    spec = {"containers": [CONTAINER | {"resources": {"limits": {"memory": "64Mi"}}}]}
    weighed = spec | {"overhead": {"memory": "160Mi"}}
    assert "memory" not in resources.pod_totals(spec, "kata")
    assert resources.pod_totals(spec, "crun")["memory"] == {"limit": 64 << 20}
    assert resources.pod_totals(weighed, "kata")["memory"] == {"limit": 224 << 20}
