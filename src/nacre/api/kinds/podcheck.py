"""What Kubernetes refuses in a pod's spec, in its words (core/v1 validation)."""

from __future__ import annotations

import re
from typing import Any

from nacre.api import quantity
from nacre.api.kind import DNS_LABEL, LABEL_WORDS, label_name, subdomain_name
from nacre.api.status import Cause, duplicate, forbidden_field, invalid_value, not_found_value, not_supported, required

Object = dict[str, Any]

RESTART_POLICIES = ("Always", "Never", "OnFailure")
DNS_POLICIES = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
MESSAGE_POLICIES = ("FallbackToLogsOnError", "File")
PROTOCOLS = ("SCTP", "TCP", "UDP")
SCHEMES = ("HTTP", "HTTPS")
HOST_PATH_TYPES = ("", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket")
TOLERATION_EFFECTS = ("NoExecute", "NoSchedule", "PreferNoSchedule")
PROBE_ACTIONS = ("exec", "httpGet", "tcpSocket", "grpc")
HOOK_ACTIONS = ("exec", "httpGet", "tcpSocket", "sleep")
NOT_NEGATIVE = "must be greater than or equal to 0"
_ENV_NAME = re.compile(r"[ -<>-~]+")
_ENV_WORDS = "a valid environment variable name must consist only of printable ASCII characters other than '='"
_HEADER = re.compile(r"[-A-Za-z0-9]+")
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?!.*--)[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def check_spec(spec: Object) -> list[Cause]:
    causes: list[Cause] = []
    volumes = _check_volumes(spec.get("volumes", []), causes)
    if not spec.get("containers"):
        causes.append(required("spec.containers"))
    names: set[str] = set()
    for group in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(group, [])):
            _check_container(container, f"spec.{group}[{index}]", volumes, names, causes, init=group == "initContainers")
    _one_of(spec, "spec.restartPolicy", RESTART_POLICIES, causes)
    _one_of(spec, "spec.dnsPolicy", DNS_POLICIES, causes)
    for key in ("terminationGracePeriodSeconds",):
        if spec.get(key, 0) < 0:
            causes.append(invalid_value(f"spec.{key}", spec[key], NOT_NEGATIVE))
    if "activeDeadlineSeconds" in spec and spec["activeDeadlineSeconds"] < 1:
        causes.append(
            invalid_value(
                "spec.activeDeadlineSeconds", spec["activeDeadlineSeconds"], "must be between 1 and 2147483647, inclusive"
            )
        )
    for key in ("nodeName", "serviceAccountName", "runtimeClassName"):
        if spec.get(key):
            causes += subdomain_name(spec[key], f"spec.{key}")
    for key in ("hostname", "subdomain"):
        if spec.get(key):
            causes += label_name(spec[key], f"spec.{key}")
    for index, one in enumerate(spec.get("tolerations", [])):
        _check_toleration(one, f"spec.tolerations[{index}]", causes)
    if spec.get("dnsPolicy") == "None" and not spec.get("dnsConfig", {}).get("nameservers"):
        causes.append(required("spec.dnsConfig.nameservers", "must provide at least one DNS nameserver when `dnsPolicy` is None"))
    if spec.get("hostPID") and spec.get("shareProcessNamespace"):
        causes.append(
            invalid_value("spec.shareProcessNamespace", True, "ShareProcessNamespace and HostPID cannot both be enabled")
        )
    _check_host_ports(spec, causes)
    return causes


def _one_of(holder: Object, field: str, words: tuple[str, ...], causes: list[Cause]) -> None:
    value = holder.get(field.rsplit(".", 1)[1])
    if value is None or value == "":
        causes.append(required(field))
    elif value not in words:
        causes.append(not_supported(field, value, words))


# ---- volumes


def _check_volumes(volumes: list[Object], causes: list[Cause]) -> set[str]:
    names: set[str] = set()
    for index, volume in enumerate(volumes):
        where = f"spec.volumes[{index}]"
        name = volume.get("name", "")
        if not name:
            causes.append(required(f"{where}.name"))
        elif not DNS_LABEL.fullmatch(name) or len(name) > 63:
            causes.append(invalid_value(f"{where}.name", name, LABEL_WORDS))
        elif name in names:
            causes.append(duplicate(f"{where}.name", name))
        names.add(name)
        sources = [key for key in volume if key != "name"]
        causes += [forbidden_field(f"{where}.{key}", "may not specify more than 1 volume type") for key in sources[1:]]
        for key in sources[:1]:
            _check_source(key, volume[key], f"{where}.{key}", causes)
    return names


def _check_source(kind: str, source: Object, where: str, causes: list[Cause]) -> None:
    if kind == "hostPath":
        path = source.get("path", "")
        if not path:
            causes.append(required(f"{where}.path"))
        elif ".." in path.split("/"):
            causes.append(invalid_value(f"{where}.path", path, "must not contain '..'"))
        if source.get("type", "") not in HOST_PATH_TYPES:
            causes.append(not_supported(f"{where}.type", source["type"], HOST_PATH_TYPES[1:]))
    elif kind == "secret" and not source.get("secretName"):
        causes.append(required(f"{where}.secretName"))
    elif kind == "configMap" and not source.get("name"):
        causes.append(required(f"{where}.name"))
    elif kind == "persistentVolumeClaim" and not source.get("claimName"):
        causes.append(required(f"{where}.claimName"))
    if "defaultMode" in source and not 0 <= source["defaultMode"] <= 0o777:
        words = "must be a number between 0 and 0777 (octal), both inclusive"
        causes.append(invalid_value(f"{where}.defaultMode", source["defaultMode"], words))
    for index, item in enumerate(source.get("items", [])):
        _check_item(kind, item, f"{where}.items[{index}]", causes)


def _check_item(kind: str, item: Object, where: str, causes: list[Cause]) -> None:
    path = item.get("path", "")
    if kind != "downwardAPI" and not item.get("key"):
        causes.append(required(f"{where}.key"))
    if not path:
        causes.append(required(f"{where}.path"))
    elif path.startswith("/"):
        causes.append(invalid_value(f"{where}.path", path, "must be a relative path"))
    elif ".." in path.split("/"):
        causes.append(invalid_value(f"{where}.path", path, "must not contain '..'"))
    if kind == "downwardAPI" and not item.keys() & {"fieldRef", "resourceFieldRef"}:
        causes.append(required(where, "one of fieldRef and resourceFieldRef is required"))


# ---- containers


def _check_container(
    container: Object, where: str, volumes: set[str], names: set[str], causes: list[Cause], *, init: bool
) -> None:
    name = container.get("name", "")
    if not name:
        causes.append(required(f"{where}.name"))
    elif not DNS_LABEL.fullmatch(name) or len(name) > 63:
        causes.append(invalid_value(f"{where}.name", name, LABEL_WORDS))
    elif name in names:
        causes.append(duplicate(f"{where}.name", name))
    names.add(name)
    image = container.get("image", "")
    if not image:
        causes.append(required(f"{where}.image"))
    elif image != image.strip():
        causes.append(invalid_value(f"{where}.image", image, "must not have leading or trailing whitespace"))
    _one_of(container, f"{where}.imagePullPolicy", PULL_POLICIES, causes)
    _one_of(container, f"{where}.terminationMessagePolicy", MESSAGE_POLICIES, causes)
    _check_ports(container.get("ports", []), f"{where}.ports", causes)
    _check_env(container, where, causes)
    _check_mounts(container.get("volumeMounts", []), f"{where}.volumeMounts", volumes, causes)
    _check_resources(container.get("resources", {}), f"{where}.resources", causes)
    sidecar = init and container.get("restartPolicy") == "Always"
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if probe in container and init and not sidecar:
            causes.append(forbidden_field(f"{where}.{probe}", "may not be set for init containers without restartPolicy=Always"))
        elif probe in container:
            _check_probe(container[probe], f"{where}.{probe}", causes, ready=probe == "readinessProbe")
    for hook, action in container.get("lifecycle", {}).items():
        if hook in ("postStart", "preStop"):
            _check_action(action, f"{where}.lifecycle.{hook}", HOOK_ACTIONS, causes)
    if "restartPolicy" in container and not init:
        causes.append(forbidden_field(f"{where}.restartPolicy", "may not be set for non-init containers"))


def _check_ports(ports: list[Object], where: str, causes: list[Cause]) -> None:
    names: set[str] = set()
    for index, port in enumerate(ports):
        here = f"{where}[{index}]"
        if name := port.get("name"):
            if not _PORT_NAME.fullmatch(name) or not re.search("[a-z]", name):
                words = (
                    "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-), be no more than 15 characters, "
                    "and contain at least one letter (a-z)"
                )
                causes.append(invalid_value(f"{here}.name", name, words))
            elif name in names:
                causes.append(duplicate(f"{here}.name", name))
            names.add(name)
        if not port.get("containerPort"):
            causes.append(required(f"{here}.containerPort"))
        for key in ("containerPort", "hostPort"):
            if port.get(key):
                _check_port(port[key], f"{here}.{key}", causes)
        if port.get("protocol") not in PROTOCOLS:
            causes.append(not_supported(f"{here}.protocol", port.get("protocol"), PROTOCOLS))


def _check_port(value: Any, where: str, causes: list[Cause]) -> None:
    if isinstance(value, int) and not 1 <= value <= 65535:
        causes.append(invalid_value(where, value, "must be between 1 and 65535, inclusive"))
    elif isinstance(value, str) and not (_PORT_NAME.fullmatch(value) and re.search("[a-z]", value)):
        causes.append(invalid_value(where, value, "must be a port number or a port's name"))


def _check_env(container: Object, where: str, causes: list[Cause]) -> None:
    for index, variable in enumerate(container.get("env", [])):
        here = f"{where}.env[{index}]"
        name = variable.get("name", "")
        if not name:
            causes.append(required(f"{here}.name"))
        elif not _ENV_NAME.fullmatch(name):
            causes.append(invalid_value(f"{here}.name", name, _ENV_WORDS))
        source = variable.get("valueFrom")
        if source is None:
            continue
        if variable.get("value"):
            causes.append(invalid_value(f"{here}.valueFrom", "", "may not be specified when `value` is not empty"))
        if len(source) != 1:
            words = (
                "may not have more than one field specified at a time"
                if source
                else "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"
            )
            causes.append(invalid_value(f"{here}.valueFrom", "", words))
        for kind in ("configMapKeyRef", "secretKeyRef"):
            if kind in source and not source[kind].get("key"):
                causes.append(required(f"{here}.valueFrom.{kind}.key"))
    for index, source in enumerate(container.get("envFrom", [])):
        if len(source.keys() & {"configMapRef", "secretRef"}) != 1:
            causes.append(invalid_value(f"{where}.envFrom[{index}]", "", "must specify one of: `configMapRef` or `secretRef`"))


def _check_mounts(mounts: list[Object], where: str, volumes: set[str], causes: list[Cause]) -> None:
    paths: set[str] = set()
    for index, mount in enumerate(mounts):
        here = f"{where}[{index}]"
        name, path = mount.get("name", ""), mount.get("mountPath", "")
        if not name:
            causes.append(required(f"{here}.name"))
        elif name not in volumes:
            causes.append(not_found_value(f"{here}.name", name))
        if not path:
            causes.append(required(f"{here}.mountPath"))
        elif path in paths:
            causes.append(invalid_value(f"{here}.mountPath", path, "must be unique"))
        paths.add(path)
        sub = mount.get("subPath", "")
        if sub.startswith("/"):
            causes.append(invalid_value(f"{here}.subPath", sub, "must be a relative path"))
        elif ".." in sub.split("/"):
            causes.append(invalid_value(f"{here}.subPath", sub, "must not contain '..'"))
        if sub and mount.get("subPathExpr"):
            causes.append(
                invalid_value(f"{here}.subPathExpr", mount["subPathExpr"], "subPathExpr and subPath are mutually exclusive")
            )


def _check_resources(resources: Object, where: str, causes: list[Cause]) -> None:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for part, table in (("limits", limits), ("requests", requests)):
        for name, text in table.items():
            if quantity.nano(text) < 0:
                causes.append(invalid_value(f"{where}.{part}[{name}]", text, NOT_NEGATIVE))
            if "/" not in name and name not in ("cpu", "memory", "ephemeral-storage") and not name.startswith("hugepages-"):
                causes.append(invalid_value(f"{where}.{part}[{name}]", name, "must be a standard resource for containers"))
    for name, text in requests.items():
        if name in limits and quantity.nano(text) > quantity.nano(limits[name]):
            causes.append(
                invalid_value(f"{where}.requests", text, f"must be less than or equal to {name} limit of {limits[name]}")
            )


def _check_probe(probe: Object, where: str, causes: list[Cause], *, ready: bool) -> None:
    _check_action(probe, where, PROBE_ACTIONS, causes)
    for key in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if probe.get(key, 0) < 0:
            causes.append(invalid_value(f"{where}.{key}", probe[key], NOT_NEGATIVE))
    if not ready and probe.get("successThreshold", 1) != 1:
        causes.append(invalid_value(f"{where}.successThreshold", probe["successThreshold"], "must be 1"))


def _check_action(holder: Object, where: str, known: tuple[str, ...], causes: list[Cause]) -> None:
    actions = [key for key in known if key in holder]
    if not actions:
        causes.append(required(where, "must specify a handler type"))
    causes += [forbidden_field(f"{where}.{key}", "may not specify more than 1 handler type") for key in actions[1:]]
    for key in actions[:1]:
        action = holder[key]
        if key == "exec" and not action.get("command"):
            causes.append(required(f"{where}.exec.command"))
        if key in ("httpGet", "tcpSocket", "grpc"):
            if not action.get("port"):
                causes.append(required(f"{where}.{key}.port"))
            else:
                _check_port(action["port"], f"{where}.{key}.port", causes)
        if key == "httpGet":
            _check_http(action, f"{where}.httpGet", causes)


def _check_http(action: Object, where: str, causes: list[Cause]) -> None:
    if action.get("scheme") not in SCHEMES:
        causes.append(not_supported(f"{where}.scheme", action.get("scheme"), SCHEMES))
    for index, header in enumerate(action.get("httpHeaders", [])):
        if not _HEADER.fullmatch(header.get("name", "")):
            words = "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is "
            causes.append(invalid_value(f"{where}.httpHeaders[{index}]", header.get("name", ""), words + "'[-A-Za-z0-9]+')"))


def _check_toleration(one: Object, where: str, causes: list[Cause]) -> None:
    operator = one.get("operator", "")
    if not one.get("key") and operator != "Exists":
        causes.append(
            invalid_value(
                f"{where}.operator",
                operator,
                'operator must be Exists when `key` is empty, which means "match all values and all keys"',
            )
        )
    if operator not in ("", "Equal", "Exists"):
        causes.append(not_supported(f"{where}.operator", operator, ("Equal", "Exists")))
    if operator == "Exists" and one.get("value"):
        causes.append(invalid_value(f"{where}.operator", one["value"], "value must be empty when `operator` is 'Exists'"))
    if one.get("effect") and one["effect"] not in TOLERATION_EFFECTS:
        causes.append(not_supported(f"{where}.effect", one["effect"], TOLERATION_EFFECTS))
    if "tolerationSeconds" in one and one.get("effect") != "NoExecute":
        causes.append(
            invalid_value(f"{where}.effect", one.get("effect", ""), "effect must be 'NoExecute' when `tolerationSeconds` is set")
        )


def _check_host_ports(spec: Object, causes: list[Cause]) -> None:
    taken: set[tuple[Any, ...]] = set()
    for index, container in enumerate(spec.get("containers", [])):
        for number, port in enumerate(container.get("ports", [])):
            where = f"spec.containers[{index}].ports[{number}]"
            if not port.get("hostPort"):
                continue
            if spec.get("hostNetwork") and port["hostPort"] != port.get("containerPort"):
                causes.append(
                    invalid_value(
                        f"{where}.containerPort", port.get("containerPort"), "must match `hostPort` when `hostNetwork` is true"
                    )
                )
            key = (port.get("protocol"), port.get("hostIP", ""), port["hostPort"])
            if key in taken:
                causes.append(duplicate(f"{where}.hostPort", port["hostPort"]))
            taken.add(key)
