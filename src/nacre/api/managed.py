"""managedFields: who owns which field, kept for every write; and server-side apply, which is decided by it.

A set of fields is a set of paths; a path is a tuple of fieldsV1 words: `f:NAME` (struct field or map key), `k:{"name":"web"}`
(element of a keyed list), `v:"x"` (element of a set), "." (the map or element itself).
"""

from __future__ import annotations

import json
from typing import Any

from nacre.api.kind import Kind
from nacre.api.schema import Struct, Type
from nacre.api.shape import DEPTH
from nacre.api.status import Cause, Refusal, invalid_value

Object = dict[str, Any]
Path = tuple[str, ...]
Owned = dict[Path, Any]  # path -> the value there (None for ".")

_SERVERS_OWN = {
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp",
    "deletionGracePeriodSeconds", "managedFields", "selfLink",
}  # fmt: skip
_KEY_DEFAULTS = {"protocol": "TCP"}  # what an omitted list key means
MANAGER_LIMIT = 128  # bytes


def flatten(thing: Object, struct: Struct) -> Owned:
    """Every field of the object that someone can own, with its value."""
    found: Owned = {}
    for key, value in thing.items():
        kind = struct.fields.get(key)
        if key in ("apiVersion", "kind") or kind is None:
            continue
        if key == "metadata":
            value = {name: part for name, part in value.items() if name not in _SERVERS_OWN}
            if not value:
                continue
        _walk(value, kind, ("f:" + key,), found)
    return found


def _walk(value: Any, kind: Type, path: Path, found: Owned) -> None:
    word = kind.word
    if word == "struct" and value and not (kind.atomic or kind.struct.atomic):
        fields = kind.struct.fields
        for key, item in value.items():
            if key in fields:
                _walk(item, fields[key], (*path, "f:" + key), found)
    elif word == "map" and value and not kind.atomic and kind.items is not None:
        found[*path, "."] = None
        for key, item in value.items():
            _walk(item, kind.items, (*path, "f:" + key), found)
    elif word == "list" and value and kind.list_type == "map" and kind.items is not None:
        for item in value:
            here = (*path, "k:" + _words(_keys(item, kind)))
            found[*here, "."] = None
            _walk(item, kind.items, here, found)
    elif word == "list" and value and kind.list_type == "set":
        for item in value:
            found[*path, "v:" + _words(item)] = item
    else:
        found[path] = value


def _keys(item: Object, kind: Type) -> Object:
    return {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in kind.keys}


def _words(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def to_fields(paths: set[Path]) -> Object:
    """The fieldsV1 form."""
    root: Object = {}
    for path in sorted(paths):
        node = root
        for part in path:
            node = node.setdefault(part, {})
    return root


def from_fields(fields: Object) -> set[Path]:
    found: set[Path] = set()
    waiting: list[tuple[Path, Object]] = [((), fields)]
    while waiting:
        path, node = waiting.pop()
        if not node and path:
            found.add(path)
        for part, child in node.items():
            waiting.append(((*path, part), child if isinstance(child, dict) else {}))
    return found


def check_manager(name: str) -> list[Cause]:
    """A field manager's name (meta/v1 validation)."""
    if len(name.encode()) > MANAGER_LIMIT:
        return [Cause("FieldValueTooLong", "fieldManager", f"Too long: may not be more than {MANAGER_LIMIT} bytes")]
    if not name.isprintable():
        return [invalid_value("fieldManager", name, "should only contain printable characters")]
    return []


def check(thing: Object) -> list[Cause]:
    """The managedFields that a client sends with a new object: later writes are worked out from them."""
    causes = []
    for index, entry in enumerate(thing["metadata"].get("managedFields", [])):
        where = f"metadata.managedFields[{index}]"
        if entry.get("operation") not in ("Apply", "Update"):
            causes.append(invalid_value(f"{where}.operation", entry.get("operation", ""), "must be `Apply` or `Update`"))
        if entry.get("fieldsType", "FieldsV1") != "FieldsV1":
            causes.append(invalid_value(f"{where}.fieldsType", entry["fieldsType"], "must be `FieldsV1`"))
        if not _is_fields(entry.get("fieldsV1", {})):
            causes.append(Cause("FieldValueInvalid", f"{where}.fieldsV1", "Invalid value: this is no set of fields"))
    return causes


def _is_fields(fields: Any) -> bool:
    waiting = [(fields, 0)]
    while waiting:
        node, depth = waiting.pop()
        if not isinstance(node, dict) or depth > DEPTH or not all(map(_is_part, node)):
            return False
        waiting += [(child, depth + 1) for child in node.values()]
    return True


def _is_part(part: str) -> bool:
    if part == "." or part.startswith("f:"):
        return True
    try:
        value = json.loads(part[2:])
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, dict) if part.startswith("k:") else part.startswith(("v:", "i:")) and not isinstance(value, dict | list)
    )


class Ledger:
    """The managedFields of one object while a write is worked out."""

    def __init__(self, entries: list[Object]) -> None:
        self._entries = entries
        self.sets = [from_fields(entry.get("fieldsV1", {})) for entry in entries]

    def mine(self, manager: str, operation: str, api_version: str, subresource: str) -> int | None:
        wanted = (manager, operation, api_version, subresource)
        for index, entry in enumerate(self._entries):
            if wanted == (entry.get("manager"), entry.get("operation"), entry.get("apiVersion"), entry.get("subresource", "")):
                return index
        return None

    def add(self, manager: str, operation: str, api_version: str, subresource: str) -> int:
        entry = {"manager": manager, "operation": operation, "apiVersion": api_version, "fieldsType": "FieldsV1"}
        self._entries = [*self._entries, entry | ({"subresource": subresource} if subresource else {})]
        self.sets.append(set())
        return len(self._entries) - 1

    def others(self, index: int | None) -> list[tuple[Object, set[Path]]]:
        pairs = zip(self._entries, self.sets, strict=True)
        return [pair for place, pair in enumerate(pairs) if place != index]

    def written(self, touched: int, at: str) -> list[Object]:
        """The entries again; those that own nothing are left out, `touched` gets the time."""
        found = []
        for index, (entry, paths) in enumerate(zip(self._entries, self.sets, strict=True)):
            if paths:
                changed = {"fieldsV1": to_fields(paths)} | ({"time": at} if index == touched or "time" not in entry else {})
                found.append(entry | changed)
        return found


def record(kind: Kind, new: Object, old: Object | None, manager: str, subresource: str, at: str) -> None:
    """Set `new`'s managedFields after an ordinary write by `manager`: what it changed is its own now, and no one else's."""
    struct = kind.structure
    before = {} if old is None else flatten(old, struct)
    after = flatten(new, struct)
    entries = (old or {}).get("metadata", {}).get("managedFields", [])
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    gone = before.keys() - after.keys()
    if not changed and not gone:
        _set(new, entries)
        return
    ledger = Ledger(entries)
    index = ledger.mine(manager, "Update", kind.api_version, subresource)
    if index is None:
        index = ledger.add(manager, "Update", kind.api_version, subresource)
    modified = changed & before.keys()
    for place, paths in enumerate(ledger.sets):
        paths -= gone if place == index else gone | modified
    ledger.sets[index] |= changed
    _set(new, ledger.written(index, at))


def _set(thing: Object, entries: list[Object]) -> None:
    thing["metadata"].pop("managedFields", None)
    if entries:
        thing["metadata"]["managedFields"] = entries


# ---- server-side apply


def apply(kind: Kind, live: Object, config: Object, manager: str, *, force: bool, subresource: str, at: str) -> Object:
    """`live` with `config` (what `manager` wants, and only that) applied; managedFields set.

    Fields that it applied before, wants no more, and nobody else owns are removed. Raises Refusal 409 naming each conflict.
    """
    struct = kind.structure
    wanted, have = flatten(config, struct), flatten(live, struct)
    ledger = Ledger(live["metadata"].get("managedFields", []))
    index = ledger.mine(manager, "Apply", kind.api_version, subresource)
    clashes = [
        (entry, path)
        for entry, paths in ledger.others(index)
        for path in sorted(paths & wanted.keys())
        if path[-1] != "." and have.get(path, _ABSENT) != wanted[path]
    ]
    if clashes and not force:
        raise _conflict(kind, str(live["metadata"].get("name", "")), clashes)
    merged = _merge(live, config, struct.fields)
    previous = ledger.sets[index] if index is not None else set()
    held = set().union(*(paths for _, paths in ledger.others(index)))
    for path in sorted(previous - wanted.keys() - held, key=lambda path: (path[-1] != ".", -len(path))):
        if not _covered(path, wanted, held):
            _drop(merged, path)
    if index is None:
        index = ledger.add(manager, "Apply", kind.api_version, subresource)
    lost = {path for _, path in clashes}
    after = flatten(merged, struct)
    unchanged = previous == wanted.keys() and after == have
    for place, paths in enumerate(ledger.sets):
        if place != index:
            paths -= lost
            paths &= after.keys()
    ledger.sets[index] = set(wanted)
    _set(merged, live["metadata"].get("managedFields", []) if unchanged else ledger.written(index, at))
    return merged


_ABSENT = object()


def _covered(path: Path, wanted: Owned, held: set[Path]) -> bool:
    """Whether something beneath `path` (a map or element, ".") is still wanted by someone."""
    if path[-1] != ".":
        return False
    prefix, length = path[:-1], len(path) - 1
    return any(other[:length] == prefix for other in wanted) or any(other[:length] == prefix for other in held)


def _conflict(kind: Kind, name: str, clashes: list[tuple[Object, Path]]) -> Refusal:
    causes = [
        {"reason": "FieldManagerConflict", "message": f"conflict with {_holder(entry)}", "field": _dotted(path)}
        for entry, path in clashes
    ]
    if len(causes) == 1:
        text = f"Apply failed with 1 conflict: {causes[0]['message']}: {causes[0]['field']}"
    else:
        fields: dict[str, list[str]] = {}
        for entry, path in clashes:
            fields.setdefault(_holder(entry), []).append(f"\n- {_dotted(path)}")
        lines = "\n".join(f"conflicts with {holder}:{''.join(fields[holder])}" for holder in sorted(fields))
        text = f"Apply failed with {len(causes)} conflicts: {lines}"
    return Refusal(409, "Conflict", text, {"name": name, "kind": kind.plural, "causes": causes})


def _holder(entry: Object) -> str:
    name = json.dumps(entry.get("manager", ""), ensure_ascii=False)
    part = f' with subresource "{entry["subresource"]}"' if entry.get("subresource") else ""
    time = f" at {entry['time']}" if entry.get("operation") == "Update" and entry.get("time") else ""
    return f"{name}{part} using {entry.get('apiVersion', '')}{time}"


def _dotted(path: Path) -> str:
    """`.spec.containers[name="web"].image`"""
    text = ""
    for part in path:
        if part.startswith("f:"):
            text += "." + part[2:]
        elif part.startswith("k:"):
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(part[2:]).items()) + "]"
        elif part.startswith("v:"):
            text += f"[={part[2:]}]"
    return text


def _merge(live: Object, config: Object, fields: dict[str, Type]) -> Object:
    found = dict(live)
    for key, value in config.items():
        kind = fields.get(key)
        found[key] = value if kind is None or key not in live else _merge_value(live[key], value, kind)
    return found


def _merge_value(live: Any, value: Any, kind: Type) -> Any:
    if kind.word == "struct" and not (kind.atomic or kind.struct.atomic):
        return _merge(live, value, kind.struct.fields)
    if kind.word == "map" and not kind.atomic and kind.items is not None:
        return live | {key: _merge_value(live[key], item, kind.items) if key in live else item for key, item in value.items()}
    if kind.word == "list" and kind.list_type == "map" and kind.items is not None:
        wanted = {_words(_keys(item, kind)): item for item in value}
        found = [
            _merge_value(item, wanted.pop(name), kind.items) if (name := _words(_keys(item, kind))) in wanted else item
            for item in live
        ]
        return [*found, *wanted.values()]
    if kind.word == "list" and kind.list_type == "set":
        return live + [item for item in value if item not in live]
    return value


def _drop(thing: Any, path: Path) -> None:
    """Remove what is at `path`, in copies of the holders on the way (the live object is not touched)."""
    if path[-1] == ".":
        path = path[:-1]
    node = thing
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        place = _place(node, part)
        if place is None:
            return
        if last:
            del node[place]
        else:
            node[place] = node[place].copy() if isinstance(node[place], dict | list) else node[place]
            node = node[place]


def _place(node: Any, part: str) -> Any:
    """Key or index of `part` in `node`, None if it is not there."""
    if part.startswith("f:"):
        return part[2:] if isinstance(node, dict) and part[2:] in node else None
    if not isinstance(node, list):
        return None
    if part.startswith("k:"):
        keys = json.loads(part[2:])
        matches = (
            index for index, item in enumerate(node) if {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys} == keys
        )
    else:
        value = json.loads(part[2:])
        matches = (index for index, item in enumerate(node) if item == value)
    return next(matches, None)
