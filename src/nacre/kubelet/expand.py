"""Environment variables of a container: literal, from ConfigMaps, Secrets, the pod itself, and $(VAR) in values and commands."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from typing import Any

from nacre.kubelet.resources import quantity
from nacre.oci.errors import Failure

_REFERENCE = re.compile(r"\$(\$|\(([^()]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']*)'\]")


class ConfigError(Failure):
    """The pod refers to a ConfigMap, Secret, key or field that is not there: CreateContainerConfigError."""

    code = "CreateContainerConfigError"


class Sources:
    """What references of one pod are looked up in; `objects` is (kind, name) → object, None where the server has none."""

    def __init__(
        self, pod: dict[str, Any], objects: Mapping[tuple[str, str], dict[str, Any] | None], node: Mapping[str, Any]
    ) -> None:
        self.pod, self._objects, self._node = pod, objects, node

    def seen_by(self, pod: dict[str, Any]) -> Sources:
        """The same look-ups for a newer version of the pod: one that has its addresses."""
        return Sources(pod, self._objects, self._node)

    def version(self, kind: str, name: str) -> str:
        """The resourceVersion that is looked up in, "" where the server had none."""
        found = self._objects.get((kind, name))
        return "" if found is None else str(found["metadata"].get("resourceVersion", ""))

    def data(self, kind: str, name: str, *, optional: bool = False) -> dict[str, bytes] | None:
        """All keys of a ConfigMap or Secret; None when it is optional and missing."""
        found = self._objects.get((kind, name))
        if found is None:
            if optional:
                return None
            raise ConfigError(
                what=f"read {kind.lower()} {name}",
                cause=f'{kind.lower()} "{name}" not found',
                remedy="create it, or set optional: true",
            )
        values = {key: text.encode() for key, text in (found.get("data") or {}).items()} if kind == "ConfigMap" else {}
        encoded = (found.get("data") if kind == "Secret" else found.get("binaryData")) or {}
        return values | {key: base64.b64decode(text) for key, text in encoded.items()}

    def key(self, kind: str, reference: Mapping[str, Any]) -> bytes | None:
        name, key, optional = str(reference.get("name", "")), str(reference["key"]), bool(reference.get("optional"))
        values = self.data(kind, name, optional=optional)
        if values is not None and key in values:
            return values[key]
        if optional:
            return None
        namespace = self.pod["metadata"]["namespace"]
        raise ConfigError(
            what=f"read {kind.lower()} {name}",
            cause=f"couldn't find key {key} in {kind} {namespace}/{name}",
            remedy="add the key, or set optional: true",
        )

    def field(self, path: str) -> str:
        """A downward API field. Raises ConfigError for one that Kubernetes does not offer."""
        metadata, spec, status = self.pod["metadata"], self.pod["spec"], self.pod.get("status") or {}
        match = _SUBSCRIPT.fullmatch(path)
        if match:
            return str((metadata.get(match[1]) or {}).get(match[2], ""))
        known = {
            "metadata.name": metadata["name"],
            "metadata.namespace": metadata["namespace"],
            "metadata.uid": metadata["uid"],
            "spec.nodeName": spec.get("nodeName", ""),
            "spec.serviceAccountName": spec.get("serviceAccountName", ""),
            "status.hostIP": self._node.get("address", ""),
            "status.hostIPs": self._node.get("address", ""),
            "status.podIP": status.get("podIP", ""),
            "status.podIPs": ",".join(one["ip"] for one in status.get("podIPs") or []),
        }
        if path in ("metadata.labels", "metadata.annotations"):
            values = metadata.get(path.removeprefix("metadata.")) or {}
            return "\n".join(f'{key}="{_quoted(value)}"' for key, value in sorted(values.items()))
        if path not in known:
            raise ConfigError(
                what="read a field of the pod", cause=f"fieldPath {path} is not offered", remedy=f"fields: {', '.join(known)}"
            )
        return str(known[path])

    def resource(self, reference: Mapping[str, Any], container: Mapping[str, Any]) -> str:
        """A resourceFieldRef, in units of its divisor, rounded up; an unset limit is the node's capacity."""
        kind, _dot, name = str(reference["resource"]).partition(".")
        wanted = str(reference.get("containerName") or container["name"])
        owner = next(
            one
            for one in (*self.pod["spec"]["containers"], *(self.pod["spec"].get("initContainers") or []))
            if one["name"] == wanted
        )
        asked = owner.get("resources") or {}
        value = (asked.get(kind) or {}).get(name)
        if value is None and kind == "limits":
            value = self._node.get("capacity", {}).get(name, 0)
        divisor = quantity(reference.get("divisor") or 1) or quantity(1)
        return str(math.ceil(quantity(value or 0) / divisor))


def environment(container: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    """The container's variables in order, references expanded. Raises ConfigError."""
    made: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        prefix = str(source.get("prefix", ""))
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field in source:
                values = sources.data(kind, source[field]["name"], optional=bool(source[field].get("optional"))) or {}
                made |= {prefix + key: value.decode(errors="surrogateescape") for key, value in values.items()}
    for variable in container.get("env") or []:
        value = _value(variable, container, sources)
        if value is not None:
            made[variable["name"]] = expanded(value, made) if "valueFrom" not in variable else value
    return made


def _value(variable: Mapping[str, Any], container: Mapping[str, Any], sources: Sources) -> str | None:
    origin = variable.get("valueFrom")
    if not origin:
        return str(variable.get("value", ""))
    for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if field in origin:
            found = sources.key(kind, origin[field])
            return None if found is None else found.decode(errors="surrogateescape")
    if "fieldRef" in origin:
        return sources.field(origin["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in origin:
        return sources.resource(origin["resourceFieldRef"], container)
    raise ConfigError(what=f"set {variable['name']}", cause=f"valueFrom has no source that nacre knows ({', '.join(origin)})")


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` replaced by its value, left alone where unknown; `$$` is one dollar."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return variables.get(match[2], match[0])

    return _REFERENCE.sub(replace, text)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
