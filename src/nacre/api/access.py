"""Who asks, and whether they may: identities are client certificates (CN is the user, O its groups).

The chain's rules, to be replaced by RBAC without a change elsewhere: system:masters may all; nodes and controllers may what their
work needs; everyone else nothing but the paths that tell of the server's health.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nacre.api.status import Refusal

PUBLIC = ("/livez", "/readyz", "/healthz", "/version")
MASTERS, NODES, AUTHENTICATED = "system:masters", "system:nodes", "system:authenticated"
CONTROLLERS = "system:kube-controller-manager"
_DISCOVERY = ("/api", "/apis", "/openapi")
_READ = frozenset({"get", "list", "watch"})
_WRITE = frozenset({"create", "update", "patch", "delete"})
_DELETE = _READ | {"delete", "deletecollection"}
_ALL = _READ | _WRITE | {"deletecollection"}

# resource (or resource/subresource) -> verbs
_NODE_RULES = {
    "nodes": _READ | {"create", "update", "patch"},
    "nodes/status": frozenset({"update", "patch", "get"}),
    "pods": _READ | {"create", "delete"},  # create: mirror pods of static manifests
    "pods/status": frozenset({"update", "patch", "get"}),
    "events": _READ | {"create", "update", "patch"},
    "leases": _READ | {"create", "update", "patch"},
    "configmaps": _READ,
    "secrets": _READ,
    "serviceaccounts": _READ,
    "namespaces": _READ,
    "runtimeclasses": _READ,
}
_CONTROLLER_RULES = {
    "pods": _DELETE,
    "pods/binding": frozenset({"create"}),
    "pods/status": frozenset({"update", "patch", "get"}),
    "nodes": _READ,
    "nodes/status": frozenset({"update", "patch", "get"}),
    "namespaces": _READ | {"create", "update", "patch"},
    "namespaces/finalize": frozenset({"update"}),
    "namespaces/status": frozenset({"update", "patch", "get"}),
    "serviceaccounts": _ALL,
    "configmaps": _ALL,
    "secrets": _DELETE,
    "events": _ALL,
    "leases": _ALL,
    "runtimeclasses": _READ,
}


@dataclass(frozen=True, slots=True)
class User:
    name: str
    groups: tuple[str, ...]


ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))


def identify(certificate: dict[str, Any] | None) -> User:
    """The user of a verified client certificate as ssl.getpeercert gives it; anonymous without one."""
    names: list[str] = []
    groups: list[str] = []
    for part in (certificate or {}).get("subject", ()):
        for key, value in part:
            if key == "commonName":
                names.append(value)
            elif key == "organizationName":
                groups.append(value)
    if not names:
        return ANONYMOUS
    return User(names[0], (*groups, AUTHENTICATED))


def check_path(user: User, path: str, verb: str) -> None:
    """May `user` ask for a path that is no object? Raises Refusal 401 or 403."""
    if path in PUBLIC or path.startswith(("/livez/", "/readyz/")) or MASTERS in user.groups:
        return
    if user is ANONYMOUS:
        raise Refusal(401, "Unauthorized", "Unauthorized")
    if verb == "get" and any(path == base or path.startswith(base + "/") for base in _DISCOVERY):
        return
    raise Refusal(403, "Forbidden", f'forbidden: User "{user.name}" cannot {verb} path "{path}"')


def check_resource(user: User, verb: str, group: str, resource: str, subresource: str, namespace: str, name: str) -> None:
    """May `user` do `verb` to the resource? Raises Refusal 401, or 403 in Kubernetes' words."""
    if MASTERS in user.groups:
        return
    if user is ANONYMOUS:
        raise Refusal(401, "Unauthorized", "Unauthorized")
    whole = f"{resource}/{subresource}" if subresource else resource
    rules = _NODE_RULES if NODES in user.groups else _CONTROLLER_RULES if user.name == CONTROLLERS else {}
    if verb in rules.get(whole, ()):
        return
    scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    words = f'User "{user.name}" cannot {verb} resource "{whole}" in API group "{group}" {scope}'
    title = f"{resource}.{group}" if group else resource
    named = f' "{name}"' if name else ""
    details = {"name": name, "group": group, "kind": resource} if group else {"name": name, "kind": resource}
    raise Refusal(
        403, "Forbidden", f"{title}{named} is forbidden: {words}", {key: value for key, value in details.items() if value}
    )
