"""The recorder: each layer hands over the document that crossed its joint, with times; `nacre trace` and `explain` read them.

One file a pod, `DIR/POD_UID.jsonl`, a JSON line a record, appended by whichever process saw the crossing (O_APPEND keeps lines
whole). At LIMIT bytes it becomes `.1.jsonl` (the former one goes), so a pod never holds more than twice that. A kill leaves at
most one torn last line, which readers skip.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

LIMIT = 512 * 1024
DOCUMENT_LIMIT = 128 * 1024  # a larger document is replaced by its size
JOINTS = ("api", "kubelet", "cri", "oci", "vm", "agent", "failure")
_SECRET_KEYS = frozenset({"password", "auth", "identity_token", "registry_token", "token", "stringData", ".dockerconfigjson"})
_OPEN_VARIABLES = ("PATH", "HOME", "HOSTNAME", "TERM")
MASKED = "(masked)"


def record(directory: str, pod_uid: str, joint: str, what: str, document: Any = None, *, took_ns: int | None = None) -> None:
    """Append one crossing of `joint` (one of JOINTS) for the pod; secrets in `document` (JSON tree) are masked.

    Never raises for a full or missing disk: observing must not stop a pod. The loss is counted in the file's next record.
    """
    global _lost
    line = {"at_ns": time.time_ns(), "joint": joint, "what": what, "document": mask(document)}
    if took_ns is not None:
        line["took_ns"] = took_ns
    if _lost:
        line["lost_before"] = _lost
    data = json.dumps(line, separators=(",", ":"), default=str).encode()
    if len(data) > DOCUMENT_LIMIT:
        data = json.dumps(line | {"document": f"({len(data)} bytes, not kept)"}, separators=(",", ":")).encode()
    path = os.path.join(directory, os.path.basename(pod_uid) + ".jsonl")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data + b"\n")
            if os.fstat(fd).st_size > LIMIT:
                os.rename(path, path.removesuffix(".jsonl") + ".1.jsonl")
        finally:
            os.close(fd)
        _lost = 0
    except OSError:
        _lost += 1


_lost = 0


def records(directory: str, pod_uid: str) -> Iterator[dict[str, Any]]:
    """Every record kept of the pod, oldest first."""
    base = os.path.join(directory, os.path.basename(pod_uid))
    for path in (base + ".1.jsonl", base + ".jsonl"):
        try:
            with open(path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue  # the torn last line of a killed writer


def forget(directory: str, pod_uid: str) -> None:
    """Remove what is kept of the pod; nothing kept is fine."""
    base = os.path.join(directory, os.path.basename(pod_uid))
    for path in (base + ".1.jsonl", base + ".jsonl"):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def mask(document: Any) -> Any:
    """`document` with the values of secret-bearing keys replaced, and all `data` of a Kubernetes Secret.

    An environment's values too (CRI `envs`, OCI `env`): below the kubelet nothing tells which of them came from a Secret.
    """
    if isinstance(document, dict):
        secret = document.get("kind") == "Secret"
        return {key: _masked(key, value, secret=secret) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [mask(value) for value in document]
    if isinstance(document, bytes):
        return f"({len(document)} bytes)"
    return document


def _masked(key: str, value: Any, *, secret: bool) -> Any:
    if value and (key in _SECRET_KEYS or (secret and key in ("data", "stringData"))):
        return MASKED
    if key in ("env", "envs") and isinstance(value, list | tuple):
        return [_variable(key, item) for item in value]
    return mask(value)


def _variable(key: str, item: Any) -> Any:
    """One variable: NAME=VALUE of OCI, {key, value} of CRI; a Pod's own `env` refers to Secrets by name and stays."""
    if isinstance(item, str):
        name, _, _value = item.partition("=")
        return item if name in _OPEN_VARIABLES else f"{name}={MASKED}"
    if key == "envs" and isinstance(item, dict) and item.get("key") not in _OPEN_VARIABLES:
        return {**item, "value": MASKED}
    return mask(item)
