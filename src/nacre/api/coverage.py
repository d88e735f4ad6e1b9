"""`python -m nacre.api.coverage`: docs/coverage.md, made of the tables that the server itself works by; a test compares them."""

from __future__ import annotations

from nacre.api import discovery, kinds, unsupported
from nacre.api.kind import Kind

_HEAD = """# What of Kubernetes is there
API level {level}. Made by `python -m nacre.api.coverage` from the tables the server works by.

What is not acted upon is refused, or warned about by name (`Warning:` header, kubectl prints it); it is never silently stored.

## Kinds
| kind | group/version | verbs | subresources | field selectors beside metadata.name, metadata.namespace |
|-|-|-|-|-|
"""
_REST = """
Every list takes `limit`, `continue`, `labelSelector`, `resourceVersion`, `resourceVersionMatch`; every watch `timeoutSeconds`,
`allowWatchBookmarks`, `sendInitialEvents`; every write `dryRun=All`, `fieldManager`, `fieldValidation`. Bodies: JSON, YAML, Kubernetes
protobuf. Answers: JSON, Table, PartialObjectMetadata. Patches: JSON, merge, strategic merge, server-side apply.
OpenAPI v3; v2 is a document without definitions.

## Not there yet
- Other kinds: `kubectl` says that the server does not have the resource type.
- `pods/portforward`, `pods/eviction`, `pods/ephemeralcontainers`, `pods/resize`: 501 with a sentence.
- `exec` and `attach` over SPDY: refused with a sentence by the kubelet; over WebSocket (kubectl 1.30 and newer) they work.
- Identities are client certificates only; service account tokens, RBAC and their review kinds are to come. So pods get no token volume.
- Deletion: `propagationPolicy: Orphan` is refused; `Foreground` is taken as `Background`.
- Secrets of type `kubernetes.io/service-account-token` get no token.

## Fields
"""


def text() -> str:
    head = _HEAD.format(level=".".join(discovery.KUBERNETES))
    return head + "".join(map(_row, kinds.KINDS)) + _REST + unsupported.markdown().rstrip() + "\n"


def _row(kind: Kind) -> str:
    subresources = ", ".join(sub.path for sub in kind.subresources) or "–"
    verbs = "all" if len(kind.verbs) == 8 else ", ".join(kind.verbs)
    fields = ", ".join(f"`{name}`" for name in kind.fields) or "–"
    return f"| {kind.name} | {kind.api_version} | {verbs} | {subresources} | {fields} |\n"


if __name__ == "__main__":
    print(text(), end="")
