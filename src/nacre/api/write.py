"""Creating and changing objects: body to tree, defaults, admission, checks, managedFields, compare-and-swap.

Every write goes through here; `delete` has the removals, `read` the rest.
"""

from __future__ import annotations

import copy
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nacre.api import decode, managed, meta, objects, patch, unsupported
from nacre.api.access import User
from nacre.api.admission import Admission
from nacre.api.kind import Kind, Object
from nacre.api.shape import Mistyped, Reader
from nacre.api.status import Refusal, already_exists, bad_request, conflict, invalid, not_found, unsupported_media
from nacre.api.store import Entry, Mismatch, Store

RETRIES = 20  # of an unconditional change that others keep overtaking
STRATEGIC = "application/strategic-merge-patch+json"
MERGE, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"
APPLY, APPLY_CBOR = "application/apply-patch+yaml", "application/apply-patch+cbor"
PATCH_TYPES = (JSON_PATCH, MERGE, APPLY, STRATEGIC)
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"  # no vowels, nothing that looks like another


@dataclass(slots=True)
class Call:
    """One request about an object or a collection, as `server` read it from path and query."""

    kind: Kind
    namespace: str
    name: str
    subresource: str
    verb: str
    user: User
    manager: str
    validation: str = "Warn"  # Strict, Warn, Ignore: what unknown and duplicate fields lead to
    dry_run: bool = False
    force: bool = False
    body: bytes = b""
    content_type: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.kind.key(self.namespace, self.name)


class Writer:
    def __init__(self, store: Store, admission: Admission) -> None:
        self._store, self._admission = store, admission

    async def create(self, call: Call) -> Object:
        thing = self.read_body(call, decode.body(call.body, call.content_type))
        return await self.create_object(call, thing)

    async def create_object(self, call: Call, thing: Object) -> Object:
        """Store a new object of known shape; its namespace must exist."""
        kind = call.kind
        call.name = call.name or thing["metadata"].get("name", "")
        meta.begin(kind, thing, call.namespace, call.name)
        self._admission.namespace(
            kind, call.namespace, thing["metadata"].get("name") or thing["metadata"].get("generateName", "")
        )
        kind.prepare_create(thing)
        generated = not thing["metadata"].get("name")
        for _ in range(RETRIES):
            fresh = copy.deepcopy(thing) if generated else thing
            if generated:
                fresh["metadata"]["name"] = _generated(fresh["metadata"].get("generateName", ""), kind)
            try:
                return await self._create_named(call, fresh)
            except Refusal as refusal:
                if not generated or refusal.reason != "AlreadyExists":
                    raise
        raise Refusal(500, "ServerTimeout", "no free generated name was found, try again")

    async def _create_named(self, call: Call, thing: Object) -> Object:
        kind, name = call.kind, thing["metadata"]["name"]
        kind.defaults(thing)
        self._admission.create(kind, thing)
        refused, warned = unsupported.judge(kind.group, kind.name, thing)
        causes = meta.check(kind, thing) + managed.check(thing) + kind.check(thing) + refused
        if causes:
            raise invalid(kind, name, causes)
        call.warnings += warned
        thing["metadata"]["uid"] = str(uuid.uuid4())
        if "managedFields" not in thing["metadata"]:
            managed.record(kind, thing, None, call.manager, call.subresource, objects.stamp(objects.now()))
        key = kind.key(call.namespace, name)
        if call.dry_run:
            if self._store.get(key) is not None:
                raise already_exists(kind, name)
            return thing
        try:
            revision = await self._store.put(key, objects.to_stored(kind, thing), expect=0)
        except Mismatch as mismatch:
            raise already_exists(kind, name) from mismatch
        thing["metadata"]["resourceVersion"] = str(revision)
        return thing

    async def update(self, call: Call) -> tuple[Object, bool]:
        """PUT; (the object, whether it was created)."""
        thing = self.read_body(call, decode.body(call.body, call.content_type))
        named = thing["metadata"].setdefault("name", call.name)
        if named != call.name:
            raise bad_request(f"the name of the object ({named}) does not match the name on the URL ({call.name})")
        meta.check_namespace(call.kind, thing, call.namespace)
        wanted = thing["metadata"].get("resourceVersion", "")
        return await self.change(call, lambda _: copy.deepcopy(thing), expect=wanted, uid=thing["metadata"].get("uid", "")), False

    async def patch(self, call: Call) -> tuple[Object, bool]:
        """PATCH of any type; (the object, whether server-side apply created it)."""
        media = call.content_type.split(";", 1)[0].strip()
        if media == APPLY:
            return await self._apply(call)
        struct = call.kind.structure
        if media == STRATEGIC:
            body = decode.from_yaml(call.body)
            return await self.change(call, lambda old: self._patched(call, patch.strategic(old, body, struct))), False
        if media == MERGE:
            body = decode.from_yaml(call.body)
            return await self.change(call, lambda old: self._patched(call, patch.merge(old, body))), False
        if media == JSON_PATCH:
            body = decode.from_json(call.body)
            return await self.change(call, lambda old: self._patched(call, patch.json_patch(old, body))), False
        raise unsupported_media(media, PATCH_TYPES)

    async def _apply(self, call: Call) -> tuple[Object, bool]:
        """Server-side apply: creates what is not there."""
        if not call.manager:
            raise invalid(call.kind, call.name, [meta.manager_required()])
        config = self.read_body(call, decode.from_yaml(call.body))
        if config["metadata"].get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        if config["metadata"].setdefault("name", call.name) != call.name:
            raise bad_request("the name of the object does not match the name on the URL")
        meta.check_namespace(call.kind, config, call.namespace)
        at = objects.stamp(objects.now())

        def change(old: Object) -> Object:
            merged = managed.apply(call.kind, old, config, call.manager, force=call.force, subresource=call.subresource, at=at)
            return self._patched(call, merged)  # without the maps and lists that became empty

        if call.subresource or self._store.get(call.key) is not None:
            return await self.change(call, change, applied=True), False
        empty: Object = {"apiVersion": config["apiVersion"], "kind": config["kind"], "metadata": {}}
        return await self.create_object(call, change(empty)), True

    def _patched(self, call: Call, tree: Object) -> Object:
        """A patch's outcome, read as its kind again."""
        reader = Reader()
        try:
            thing = reader.read(tree, call.kind.structure)
        except Mistyped as error:
            raise Refusal(422, "Invalid", f'{call.kind.name} "{call.name}" is invalid: patch: Invalid value: {error}') from error
        thing.setdefault("metadata", {})
        self._strict(call, reader.strict, prefix="")
        return thing

    async def change(
        self,
        call: Call,
        act: Callable[[Object], Object],
        *,
        expect: str = "",
        uid: str = "",
        applied: bool = False,
    ) -> Object:
        """Replace the object by `act` of it, again when someone else was quicker; `expect` and `uid` are preconditions."""
        for _ in range(RETRIES):
            entry = self._store.get(call.key)
            if entry is None:
                raise not_found(call.kind, call.name)
            old = objects.load_entry(call.kind, entry)
            meta.precondition(call.kind, old, expect, uid)
            new = act(copy.deepcopy(old))
            if causes := meta.check_identity(new, old):
                raise invalid(call.kind, call.name, causes)
            stated = new["metadata"].get("resourceVersion", "")
            if stated and stated != old["metadata"]["resourceVersion"]:
                raise conflict(call.kind, call.name)
            self._settle(call, new, old, applied=applied)
            if _same(new, old):
                return old
            if call.dry_run:
                return new
            try:
                return await self._replace(call, new, entry)
            except Mismatch as mismatch:
                if mismatch.found is None:
                    raise not_found(call.kind, call.name) from mismatch
                if expect:
                    raise conflict(call.kind, call.name) from mismatch
        raise conflict(call.kind, call.name)

    async def _replace(self, call: Call, new: Object, entry: Entry) -> Object:
        """Store `new` over `entry`, or remove the object when it was only waiting for its finalizers."""
        if meta.is_finished(call.kind, new):
            revision = await self._store.remove(call.key, expect=entry.revision)
        else:
            revision = await self._store.put(call.key, objects.to_stored(call.kind, new), expect=entry.revision)
        new["metadata"]["resourceVersion"] = str(revision)
        return new

    def _settle(self, call: Call, new: Object, old: Object, *, applied: bool) -> None:
        """Bring `new` to what may be stored in place of `old`, and check it."""
        kind = call.kind
        meta.carry_over(new, old)
        if call.subresource:
            meta.only_subresource(kind, call.subresource, new, old)
        else:
            if kind.has_status:
                meta.keep(new, old, "status")
            kind.prepare_update(new, old)
        if not call.subresource:
            kind.defaults(new)
        causes = meta.check(kind, new) + meta.check_update(new, old)
        if not call.subresource:
            causes += kind.check(new) + kind.check_update(new, old)
            if new.get("spec") != old.get("spec"):
                refused, warned = unsupported.judge(kind.group, kind.name, new)
                call.warnings[:] = [*dict.fromkeys(call.warnings + warned)]
                causes += refused
        if causes:
            raise invalid(kind, call.name, causes)
        if kind.counts_generations and new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
        if not applied:
            managed.record(kind, new, old, call.manager, call.subresource, objects.stamp(objects.now()))

    # ---- bodies

    def read_body(self, call: Call, tree: Any) -> Object:
        """`tree` as an object of the call's kind: shape checked, strictness applied; raises Refusal 400."""
        kind = call.kind
        if not isinstance(tree, dict):
            raise bad_request("the body of the request is not an object")
        name, version = tree.get("kind") or kind.name, tree.get("apiVersion") or kind.api_version
        if version != kind.api_version:
            words = f"the API version in the data ({version}) does not match the expected API version ({kind.api_version})"
            raise bad_request(words)
        if name != kind.name:
            raise bad_request(f"{kind.name} in version {kind.version!r} cannot be handled as a {name}".replace("'", '"'))
        reader = Reader()
        prefix = f'{kind.name} in version "{kind.version}" cannot be handled as a {kind.name}: '
        try:
            thing = reader.read(tree, kind.structure)
        except Mistyped as error:
            raise bad_request(prefix + str(error)) from error
        self._strict(call, reader.strict, prefix)
        thing["apiVersion"], thing["kind"] = kind.api_version, kind.name
        thing.setdefault("metadata", {})
        return thing

    def _strict(self, call: Call, faults: list[str], prefix: str) -> None:
        if not faults:
            return
        if call.validation == "Strict":
            raise bad_request(f"{prefix}strict decoding error: {', '.join(faults)}")
        if call.validation == "Warn":
            call.warnings[:] = [*dict.fromkeys(call.warnings + faults)]


def _generated(base: str, kind: Kind) -> str:
    if not base:
        raise invalid(kind, "", [meta.name_required()])
    return base[:58] + "".join(secrets.choice(_SUFFIX) for _ in range(5))


def _same(new: Object, old: Object) -> bool:
    """Whether a write would change nothing but the times of managedFields."""
    if {**new, "metadata": None} != {**old, "metadata": None}:
        return False
    mine, theirs = dict(new["metadata"]), dict(old["metadata"])
    pair = [[{**entry, "time": ""} for entry in part.pop("managedFields", [])] for part in (mine, theirs)]
    return mine == theirs and pair[0] == pair[1]
