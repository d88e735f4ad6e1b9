"""metadata (meta/v1 ObjectMeta): what the server sets, keeps, and refuses on every kind."""

from __future__ import annotations

import re
from typing import Any

from nacre.api import objects
from nacre.api.kind import Kind, Object
from nacre.api.schema import META, struct
from nacre.api.shape import Mistyped, Reader
from nacre.api.status import Cause, bad_request, conflict, invalid_value, required

ANNOTATIONS_LIMIT = 256 * 1024  # bytes of all keys and values
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME_WORDS = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character "
    "(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_VALUE_WORDS = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_SERVERS_OWN = (
    "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink", "resourceVersion",
)  # fmt: skip

_IDENTITY = ("name", "namespace", "uid", "creationTimestamp")


def begin(kind: Kind, thing: Object, namespace: str, name: str) -> None:
    """Set on a new object what is the server's; refuses (400) what contradicts the request's path."""
    meta = thing["metadata"]
    if meta.get("resourceVersion"):
        raise bad_request("resourceVersion should not be set on objects to be created")
    check_namespace(kind, thing, namespace)
    if name and meta.setdefault("name", name) != name:
        raise bad_request("the name of the object does not match the name on the URL")
    if kind.namespaced:
        meta["namespace"] = namespace
    for key in _SERVERS_OWN:
        meta.pop(key, None)
    meta["creationTimestamp"] = objects.stamp(objects.now())
    if kind.counts_generations:
        meta["generation"] = 1


def check_namespace(kind: Kind, thing: Object, namespace: str) -> None:
    given = thing["metadata"].get("namespace", "")
    if not kind.namespaced:
        if given:
            raise bad_request("namespace may not be set on an object without one")
        return
    if given and given != namespace:
        raise bad_request(f"the namespace of the provided object does not match the namespace sent on the request ({namespace})")


def carry_over(new: Object, old: Object) -> None:
    """What no client changes stays as it was."""
    mine, theirs = new["metadata"], old["metadata"]
    for key in ("name", "namespace", *_SERVERS_OWN):
        if key in theirs:
            mine[key] = theirs[key]
        else:
            mine.pop(key, None)
    new["apiVersion"], new["kind"] = old["apiVersion"], old["kind"]


def check_identity(new: Object, old: Object) -> list[Cause]:
    """A write names the object it changes, and states of it what is true (meta/v1, validation of updates)."""
    mine, theirs = new["metadata"], old["metadata"]
    wrong = [key for key in _IDENTITY if mine.get(key) and mine[key] != theirs.get(key)]
    wrong += [] if mine.get("name") else ["name"]
    return [invalid_value(f"metadata.{key}", mine.get(key, ""), "field is immutable") for key in wrong]


def keep(new: Object, old: Object, key: str) -> None:
    new.pop(key, None)
    if key in old:
        new[key] = old[key]


def only_subresource(kind: Kind, subresource: str, new: Object, old: Object) -> None:
    """A status write changes status (and labels, annotations, finalizers); finalize changes the namespace's finalizers alone.

    A binding sets both; `binding.bind` decides what.
    """
    if subresource == "binding":
        return
    wanted = "spec" if subresource == "finalize" else "status"
    for key in (old.keys() | new.keys()) - {"metadata", "apiVersion", "kind", wanted}:
        keep(new, old, key)
    if "ownerReferences" in old["metadata"] or "ownerReferences" in new["metadata"]:
        keep(new["metadata"], old["metadata"], "ownerReferences")


def precondition(kind: Kind, old: Object, expect: str, uid: str) -> None:
    meta = old["metadata"]
    if uid and uid != meta.get("uid"):
        words = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {meta.get('uid')}"
        raise conflict(kind, meta["name"], words)
    if expect and expect != meta["resourceVersion"]:
        raise conflict(kind, meta["name"])


def is_finished(kind: Kind, thing: Object) -> bool:
    """Whether an object that is being deleted waits for nothing any more."""
    meta = thing["metadata"]
    if not meta.get("deletionTimestamp") or meta.get("finalizers"):
        return False
    if kind.name == "Namespace":
        return not thing.get("spec", {}).get("finalizers")
    return not meta.get("deletionGracePeriodSeconds")


def check(kind: Kind, thing: Object) -> list[Cause]:
    meta = thing["metadata"]
    causes = kind.check_name(meta.get("name", ""), "metadata.name")
    for key, value in meta.get("labels", {}).items():
        causes += _check_key(key, "metadata.labels")
        if len(value) > 63:
            causes.append(invalid_value("metadata.labels", value, "must be no more than 63 bytes"))
        if not _LABEL_VALUE.fullmatch(value):
            causes.append(invalid_value("metadata.labels", value, _VALUE_WORDS))
    annotations = meta.get("annotations", {})
    for key in annotations:
        causes += _check_key(key.lower(), "metadata.annotations")
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > ANNOTATIONS_LIMIT:
        causes.append(
            Cause("FieldValueTooLong", "metadata.annotations", f"Too long: may not be more than {ANNOTATIONS_LIMIT} bytes")
        )
    for index, owner in enumerate(meta.get("ownerReferences", [])):
        where = f"metadata.ownerReferences[{index}]"
        causes += [
            required(f"{where}.{key}", f"{key} must not be empty")
            for key in ("apiVersion", "kind", "name", "uid")
            if not owner.get(key)
        ]
    for index, name in enumerate(meta.get("finalizers", [])):
        causes += _check_key(name, f"metadata.finalizers[{index}]")
    return causes


def _check_key(key: str, where: str) -> list[Cause]:
    prefix, slash, name = key.rpartition("/")
    if (slash and (not _PREFIX.fullmatch(prefix) or len(prefix) > 253)) or not _QUALIFIED.fullmatch(name) or len(name) > 63:
        return [invalid_value(where, key, _NAME_WORDS)]
    return []


def check_update(new: Object, old: Object) -> list[Cause]:
    """No new finalizers on an object that is being deleted (meta/v1 validation)."""
    if not old["metadata"].get("deletionTimestamp"):
        return []
    added = [name for name in new["metadata"].get("finalizers", []) if name not in old["metadata"].get("finalizers", [])]
    if not added:
        return []
    words = f"no new finalizers can be added if the object is being deleted, found new finalizers {added}".replace("'", '"')
    return [Cause("FieldValueForbidden", "metadata.finalizers", f"Forbidden: {words}")]


def name_required() -> Cause:
    return required("metadata.name", "name or generateName is required")


def manager_required() -> Cause:
    return required("fieldManager", "is required for apply patch")


def partial(thing: Object) -> Object:
    """PartialObjectMetadata."""
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": thing["metadata"]}


def read_options(tree: Any) -> Object:
    """A DeleteOptions body; raises Refusal 400."""
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise bad_request("the body of a DELETE is a DeleteOptions object")
    if tree.get("kind") not in (None, "", "DeleteOptions"):
        raise bad_request(f'no kind "{tree["kind"]}" is accepted as the body of a DELETE')
    try:
        return Reader().read(tree, struct(META + "DeleteOptions"))
    except Mistyped as error:
        raise bad_request(f"DeleteOptions cannot be read: {error}") from error
