"""What the server has: discovery in the aggregated and the old form, and the version (apidiscovery/v2, meta/v1)."""

from __future__ import annotations

import functools
import hashlib
import platform
from typing import Any

from nacre import __version__
from nacre.api import kinds
from nacre.api.kind import Kind
from nacre.api.objects import encode

AGGREGATED = "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
KUBERNETES = ("1", "37")  # the API level
Document = dict[str, Any]


@functools.cache
def aggregated(root: str, version: str) -> tuple[bytes, str]:
    """(body, ETag) of the APIGroupDiscoveryList for `root`, "/api" or "/apis"; `version` is "v2" or "v2beta1"."""
    groups = _groups()
    wanted = [""] if root == "/api" else [group for group in groups if group]
    items = [
        {
            "metadata": {"name": group, "creationTimestamp": None} if group else {"creationTimestamp": None},
            "versions": [
                {
                    "version": one,
                    "resources": [_resource(kind) for kind in kinds.of_version(group, one)],
                    "freshness": "Current",
                }
                for one in groups[group]
            ],
        }
        for group in wanted
    ]
    kind = {"kind": "APIGroupDiscoveryList", "apiVersion": f"apidiscovery.k8s.io/{version}", "metadata": {}, "items": items}
    body = encode(kind)
    return body, '"' + hashlib.sha256(body).hexdigest()[:32].upper() + '"'


def _groups() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for group, version in kinds.group_versions():
        found.setdefault(group, []).append(version)
    return found


def _resource(kind: Kind) -> Document:
    found: Document = {
        "resource": kind.plural,
        "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.name},
        "scope": "Namespaced" if kind.namespaced else "Cluster",
        "singularResource": kind.singular,
        "verbs": list(kind.verbs),
    }
    if kind.short:
        found["shortNames"] = list(kind.short)
    if kind.categories:
        found["categories"] = list(kind.categories)
    if kind.subresources:
        found["subresources"] = [
            {
                "subresource": sub.path,
                "responseKind": {
                    "group": sub.group if sub.name else kind.group,
                    "version": (sub.version or "v1") if sub.name else kind.version,
                    "kind": sub.name or kind.name,
                },
                "verbs": list(sub.verbs),
            }
            for sub in kind.subresources
        ]
    return found


@functools.cache
def plain(path: str) -> bytes | None:
    """The old forms: /api, /apis, /apis/GROUP, /api/v1, /apis/GROUP/VERSION; None for another path."""
    groups = _groups()
    if path == "/api":
        return encode({"kind": "APIVersions", "versions": groups[""], "serverAddressByClientCIDRs": []})
    named = [_group(group, versions) for group, versions in groups.items() if group]
    if path == "/apis":
        return encode({"kind": "APIGroupList", "apiVersion": "v1", "groups": named})
    for group in named:
        if path == f"/apis/{group['name']}":
            return encode({"kind": "APIGroup", "apiVersion": "v1"} | group)
    for group_name, version in kinds.group_versions():
        if path == (f"/apis/{group_name}/{version}" if group_name else f"/api/{version}"):
            return encode(_resource_list(group_name, version))
    return None


def _group(name: str, versions: list[str]) -> Document:
    entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": entries, "preferredVersion": entries[0]}


def _resource_list(group: str, version: str) -> Document:
    resources: list[Document] = []
    for kind in kinds.of_version(group, version):
        entry: Document = {
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.name,
            "verbs": list(kind.verbs),
        }
        entry |= {"shortNames": list(kind.short)} if kind.short else {}
        resources.append(entry | ({"categories": list(kind.categories)} if kind.categories else {}))
        for sub in kind.subresources:
            part = {"name": f"{kind.plural}/{sub.path}", "singularName": "", "namespaced": kind.namespaced}
            resources.append(part | {"kind": sub.name or kind.name, "verbs": list(sub.verbs)})
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


@functools.cache
def version() -> bytes:
    major, minor = KUBERNETES
    return encode(
        {
            "major": major,
            "minor": minor,
            "gitVersion": f"v{major}.{minor}.0+nacre.{__version__}",
            "gitCommit": "",
            "gitTreeState": "clean",
            "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": f"python{platform.python_version()}",
            "compiler": platform.python_implementation().lower(),
            "platform": f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine()) }",
        }
    )
