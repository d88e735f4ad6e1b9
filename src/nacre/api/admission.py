"""Admission: what depends on other objects, and is decided when an object is made (namespaces, service accounts, runtime classes)."""

from __future__ import annotations

import copy
from typing import Any

from nacre.api import kinds, objects
from nacre.api.kind import Kind, Object
from nacre.api.status import forbidden, not_found
from nacre.api.store import Store

MIRROR = "kubernetes.io/config.mirror"  # annotation of a static pod's image in the API
DEFAULT_ACCOUNT = "default"


class Admission:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._namespaces = kinds.require("", "v1", "namespaces")
        self._accounts = kinds.require("", "v1", "serviceaccounts")
        self._classes = kinds.require("node.k8s.io", "v1", "runtimeclasses")

    def namespace(self, kind: Kind, namespace: str, name: str) -> None:
        """A namespaced object needs its namespace, and one that is not ending."""
        if not kind.namespaced:
            return
        found = self._load(self._namespaces, "", namespace)
        if found is None:
            raise not_found(self._namespaces, namespace)
        if found["metadata"].get("deletionTimestamp") and kind.name != "Event":
            words = f"unable to create new content in namespace {namespace} because it is being terminated"
            refusal = forbidden(kind, name, words)
            cause = {
                "reason": "NamespaceTerminating",
                "message": f"namespace {namespace} is being terminated",
                "field": "metadata.namespace",
            }
            refusal.details["causes"] = [cause]
            raise refusal

    def create(self, kind: Kind, thing: Object) -> None:
        if kind.name == "Pod":
            self._pod(kind, thing)

    def _pod(self, kind: Kind, pod: Object) -> None:
        spec, name = pod["spec"], pod["metadata"]["name"]
        self._priority(kind, spec, name)
        if MIRROR not in pod["metadata"].get("annotations", {}):
            self._account(kind, pod, name)
        self._runtime_class(kind, spec, name)

    def _priority(self, kind: Kind, spec: Object, name: str) -> None:
        """Without PriorityClasses every pod has priority 0."""
        if spec.get("priority", 0) != 0 and not spec.get("priorityClassName"):
            words = "the integer value of priority (0) must not be provided in pod spec; priority admission controller computed 0"
            raise forbidden(kind, name, words + " from the given PriorityClass name")
        spec.setdefault("priority", 0)
        spec.setdefault("preemptionPolicy", "PreemptLowerPriority")

    def _account(self, kind: Kind, pod: Object, name: str) -> None:
        spec, namespace = pod["spec"], pod["metadata"]["namespace"]
        account = spec.get("serviceAccountName") or DEFAULT_ACCOUNT
        spec["serviceAccountName"] = spec["serviceAccount"] = account
        found = self._load(self._accounts, namespace, account)
        if found is None:
            if account == DEFAULT_ACCOUNT:
                return  # its controller is about to make it; nothing of it is needed by the pod
            words = f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found'
            raise forbidden(kind, name, words)
        if not spec.get("imagePullSecrets") and found.get("imagePullSecrets"):
            spec["imagePullSecrets"] = copy.deepcopy(found["imagePullSecrets"])

    def _runtime_class(self, kind: Kind, spec: Object, name: str) -> None:
        """The class must exist; its overhead and its scheduling become the pod's (KEP-688)."""
        class_name = spec.get("runtimeClassName")
        if not class_name:
            if spec.get("overhead"):
                raise forbidden(kind, name, "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead")
            return
        found = self._load(self._classes, "", class_name)
        if found is None:
            raise forbidden(kind, name, f'pod rejected: RuntimeClass "{class_name}" not found')
        overhead = found.get("overhead", {}).get("podFixed", {})
        if spec.get("overhead") and spec["overhead"] != overhead:
            words = "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead"
            raise forbidden(kind, name, words)
        if overhead:
            spec["overhead"] = dict(overhead)
        _schedule(kind, spec, name, found.get("scheduling", {}))

    def _load(self, kind: Kind, namespace: str, name: str) -> Object | None:
        entry = self._store.get(kind.key(namespace, name))
        return None if entry is None else objects.load_entry(kind, entry)


def _schedule(kind: Kind, spec: Object, name: str, scheduling: dict[str, Any]) -> None:
    selector = spec.get("nodeSelector", {})
    for key, value in scheduling.get("nodeSelector", {}).items():
        if selector.get(key, value) != value:
            words = f"pod rejected: conflict: runtimeClass.scheduling.nodeSelector[{key}] = {value}; pod.spec.nodeSelector[{key}] = {selector[key]}"
            raise forbidden(kind, name, words)
        selector = selector | {key: value}
    if selector:
        spec["nodeSelector"] = selector
    tolerations = spec.get("tolerations", [])
    tolerations = tolerations + [one for one in scheduling.get("tolerations", []) if one not in tolerations]
    if tolerations:
        spec["tolerations"] = tolerations
