"""What Kubernetes fills into a pod (core/v1 defaults), before any merge and before any check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

SPEC = {
    "restartPolicy": "Always",
    "terminationGracePeriodSeconds": 30,
    "dnsPolicy": "ClusterFirst",
    "schedulerName": "default-scheduler",
    "enableServiceLinks": True,
}
CONTAINER = {"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}
PROBE = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
FILE_MODE = 0o644
TOKEN_LIFE_S = 3600


def apply(pod: Object) -> None:
    spec = pod.setdefault("spec", {})
    for key, value in SPEC.items():
        if spec.get(key) in (None, ""):
            spec[key] = value
    spec.setdefault("securityContext", {})
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account  # the older name follows
    for container in containers(spec):
        _container(container, host_network=bool(spec.get("hostNetwork")))
    for volume in spec.get("volumes", []):
        _volume(volume)
    for constraint in spec.get("topologySpreadConstraints", []):
        constraint.setdefault("nodeAffinityPolicy", "Honor")
        constraint.setdefault("nodeTaintsPolicy", "Ignore")
    pod.setdefault("status", {}).setdefault("phase", "Pending")
    pod["status"].setdefault("qosClass", qos_class(spec))


def containers(spec: Object) -> Iterator[Object]:
    """All of them: init, ordinary, ephemeral."""
    for group in ("initContainers", "containers", "ephemeralContainers"):
        yield from spec.get(group, [])


def _container(container: Object, *, host_network: bool) -> None:
    for key, value in CONTAINER.items():
        if not container.get(key):
            container[key] = value
    if not container.get("imagePullPolicy"):
        container["imagePullPolicy"] = "Always" if _latest(container.get("image", "")) else "IfNotPresent"
    resources = container.setdefault("resources", {})
    if resources.get("limits"):
        resources["requests"] = resources["limits"] | resources.get("requests", {})
    for port in container.get("ports", []):
        port.setdefault("protocol", "TCP")
        if host_network:
            port.setdefault("hostPort", port.get("containerPort", 0))
    for variable in container.get("env", []):
        _field(variable.get("valueFrom", {}))
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if probe := container.get(name):
            _probe(probe)
    for hook in container.get("lifecycle", {}).values():
        if isinstance(hook, dict) and (action := hook.get("httpGet")):
            _http(action)


def _latest(image: str) -> bool:
    """Whether the image's tag is "latest", said or meant; a digest is not."""
    last = image.rsplit("/", 1)[-1]
    if "@" in last:
        return False
    return ":" not in last or last.endswith(":latest")


def _probe(probe: Object) -> None:
    for key, value in PROBE.items():
        if not probe.get(key):
            probe[key] = value
    if "httpGet" in probe:
        _http(probe["httpGet"])
    if "grpc" in probe:
        probe["grpc"].setdefault("service", "")


def _http(action: Object) -> None:
    if not action.get("path"):
        action["path"] = "/"
    if not action.get("scheme"):
        action["scheme"] = "HTTP"


def _field(source: Object) -> None:
    if (reference := source.get("fieldRef")) is not None:
        reference.setdefault("apiVersion", "v1")
    if (reference := source.get("resourceFieldRef")) is not None:
        reference.setdefault("divisor", "0")


def _volume(volume: Object) -> None:
    if not volume.keys() - {"name"}:
        volume["emptyDir"] = {}
    for name in ("secret", "configMap", "downwardAPI", "projected"):
        if (source := volume.get(name)) is not None:
            source.setdefault("defaultMode", FILE_MODE)
            for item in source.get("items", []):
                _field(item)
            for part in source.get("sources", []):
                _projection(part)
    if (path := volume.get("hostPath")) is not None:
        path.setdefault("type", "")


def _projection(part: Object) -> None:
    for item in part.get("downwardAPI", {}).get("items", []):
        _field(item)
    if (token := part.get("serviceAccountToken")) is not None:
        token.setdefault("expirationSeconds", TOKEN_LIFE_S)


def qos_class(spec: Object) -> str:
    """BestEffort without any cpu or memory request or limit, Guaranteed when all limits stand and equal the requests."""
    anything, guaranteed = False, True
    for group in ("initContainers", "containers"):
        for container in spec.get(group, []):
            resources = container.get("resources", {})
            limits, requests = resources.get("limits", {}), resources.get("requests", {})
            for name in ("cpu", "memory"):
                limit, request = limits.get(name), requests.get(name, limits.get(name))
                if limit not in (None, "0") or request not in (None, "0"):
                    anything = True
                if limit in (None, "0") or request != limit:
                    guaranteed = False
    if not anything:
        return "BestEffort"
    return "Guaranteed" if guaranteed else "Burstable"
