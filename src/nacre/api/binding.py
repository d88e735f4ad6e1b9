"""pods/binding: how a scheduler gives a pod its node (core/v1 Binding)."""

from __future__ import annotations

from typing import Any

from nacre.api import decode, objects
from nacre.api.kind import Object
from nacre.api.schema import struct
from nacre.api.shape import Mistyped, Reader
from nacre.api.status import bad_request, conflict, invalid, not_supported, required
from nacre.api.write import Call, Writer


async def bind(writer: Writer, call: Call) -> Object:
    """Set the pod's node once; the answer is a Status."""
    try:
        binding = Reader().read(decode.body(call.body, call.content_type), struct("io.k8s.api.core.v1.Binding"))
    except Mistyped as error:
        raise bad_request(f'Binding in version "v1" cannot be handled as a Binding: {error}') from error
    target: dict[str, Any] = binding.get("target", {})
    if target.get("kind", "Node") not in ("", "Node"):
        raise invalid(call.kind, call.name, [not_supported("target.kind", target["kind"], ("Node", "<empty>"))])
    if not target.get("name"):
        raise invalid(call.kind, call.name, [required("target.name")])
    uid = binding.get("metadata", {}).get("uid", "")
    if binding.get("metadata", {}).get("name", call.name) != call.name:
        raise bad_request("the name of the binding does not match the name on the URL")

    def act(pod: Object) -> Object:
        name = pod["metadata"]["name"]
        if pod["metadata"].get("deletionTimestamp"):
            raise conflict(call.kind, name, f"pod {name} is being deleted, cannot be assigned to a host")
        if node := pod["spec"].get("nodeName"):
            raise conflict(call.kind, name, f'pod {name} is already assigned to node "{node}"')
        pod["spec"]["nodeName"] = target["name"]
        conditions = [one for one in pod["status"].get("conditions", []) if one.get("type") != "PodScheduled"]
        at = objects.stamp(objects.now())
        scheduled = {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": at}
        pod["status"]["conditions"] = [*conditions, scheduled]
        annotations = binding.get("metadata", {}).get("annotations")
        if annotations:
            pod["metadata"]["annotations"] = pod["metadata"].get("annotations", {}) | annotations
        return pod

    await writer.change(call, act, uid=uid)
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
