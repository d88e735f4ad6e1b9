"""One readable table per kind: defaults, checks, immutability, columns, verbs, subresources, field selectors.

Called by the rest of api; imports `kind`, `status`, `quantity` and nothing else of nacre. Owns no state.
"""

from __future__ import annotations

from nacre.api.kind import Kind
from nacre.api.kinds import config, event, lease, namespace, node, pod, runtimeclass, serviceaccount

KINDS: tuple[Kind, ...] = (
    config.CONFIG_MAP,
    event.CORE,
    namespace.KIND,
    node.KIND,
    pod.KIND,
    config.SECRET,
    serviceaccount.KIND,
    lease.KIND,
    event.EVENTS,
    runtimeclass.KIND,
)
_BY_RESOURCE = {(kind.group, kind.version, kind.plural): kind for kind in KINDS}


def find(group: str, version: str, plural: str) -> Kind | None:
    return _BY_RESOURCE.get((group, version, plural))


def group_versions() -> list[tuple[str, str]]:
    """("", "v1") first, then each group's in order of name."""
    return sorted({(kind.group, kind.version) for kind in KINDS})


def of_version(group: str, version: str) -> list[Kind]:
    return [kind for kind in KINDS if (kind.group, kind.version) == (group, version)]


def require(group: str, version: str, plural: str) -> Kind:
    """A kind the server itself relies on."""
    return _BY_RESOURCE[group, version, plural]
