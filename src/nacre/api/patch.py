"""The three patch types that are plain functions of tree and patch; server-side apply is `managed`.

Strategic merge follows the merge keys and strategies of the structure; where a list's keys are more than its merge key (ports:
containerPort and protocol) an element of the patch that names them all is matched by all.
"""

from __future__ import annotations

import copy
from typing import Any

from nacre.api.schema import Struct, Type
from nacre.api.status import Refusal, bad_request

Object = dict[str, Any]

OPERATIONS_LIMIT = 10_000
_ORDER, _REMOVE, _RETAIN, _DIRECTIVE = "$setElementOrder/", "$deleteFromPrimitiveList/", "$retainKeys", "$patch"


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386; neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merge(found.get(key), value)
    return found


# ---- strategic merge


def strategic(target: Object, patch: Object, struct: Struct) -> Object:
    """`patch` applied to an object of `struct`; neither argument is changed. Raises Refusal 400 for a malformed directive."""
    if not isinstance(patch, dict):
        raise bad_request("a strategic merge patch is an object")
    return _merge_map(target, patch, struct.fields)


def _merge_map(target: Any, patch: Object, fields: dict[str, Type], values: Type | None = None) -> Object:
    """`fields` gives a struct's types; a map's values are all of type `values`."""
    directive = patch.get(_DIRECTIVE)
    if directive == "delete":
        return {}
    if directive == "replace":
        return {key: value for key, value in patch.items() if not _is_directive(key)}
    if directive not in (None, "merge"):
        raise bad_request(f"invalid value for $patch: {directive!r}")
    found = dict(target) if isinstance(target, dict) else {}
    if (kept := patch.get(_RETAIN)) is not None:
        if not isinstance(kept, list):
            raise bad_request("$retainKeys is a list")
        found = {key: value for key, value in found.items() if key in kept}
    for key, gone in patch.items():
        if key.startswith(_REMOVE):
            name = key.removeprefix(_REMOVE)
            if not isinstance(gone, list):
                raise bad_request("$deleteFromPrimitiveList is a list")
            if isinstance(found.get(name), list):
                found[name] = [item for item in found[name] if item not in gone]
    for key, value in patch.items():
        if _is_directive(key):
            continue
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merge_value(found.get(key), value, fields.get(key, values), patch.get(_ORDER + key))
    for key, order in patch.items():  # an order without changes to the list itself
        name = key.removeprefix(_ORDER)
        if key.startswith(_ORDER) and name not in patch and isinstance(found.get(name), list):
            found[name] = _ordered(found[name], found[name], order, fields.get(name))
    return found


def _merge_value(target: Any, value: Any, kind: Type | None, order: Any) -> Any:
    if isinstance(value, dict):
        if kind is not None and kind.word == "struct":
            return _merge_map(target, value, kind.struct.fields)
        return _merge_map(target, value, {}, kind.items if kind is not None else None)
    if isinstance(value, list):
        if kind is None or "merge" not in kind.strategy.split(","):
            return [_plain(item) for item in value]
        before = target if isinstance(target, list) else []
        merged = _merge_objects(before, value, kind) if kind.merge else before + [item for item in value if item not in before]
        return merged if order is None else _ordered(merged, before, order, kind)
    return value


def _merge_objects(before: list[Any], patch: list[Any], kind: Type) -> list[Any]:
    items = kind.items
    fields = items.struct.fields if items is not None and items.word == "struct" else {}
    if any(isinstance(item, dict) and item.get(_DIRECTIVE) == "replace" for item in patch):
        return [_plain(item) for item in patch if not (isinstance(item, dict) and item.get(_DIRECTIVE) == "replace")]
    found = list(before)
    for item in patch:
        if not isinstance(item, dict) or kind.merge not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {kind.merge}")
        keys = (kind.merge, *(key for key in kind.keys if key in item and key != kind.merge))
        places = [index for index, one in enumerate(found) if all(one.get(key) == item[key] for key in keys)]
        if item.get(_DIRECTIVE) == "delete":
            found = [one for index, one in enumerate(found) if index not in places]
        elif places:
            found[places[0]] = _merge_map(found[places[0]], item, fields)
        else:
            found.append(_merge_map({}, item, fields))
    return found


def _ordered(merged: list[Any], before: list[Any], order: Any, kind: Type | None) -> list[Any]:
    """Elements that `order` names, in its order; the server's own stay before what they stood before."""
    if not isinstance(order, list):
        raise bad_request("$setElementOrder is a list")
    key = kind.merge if kind is not None else ""

    def name(item: Any) -> Any:
        return item.get(key) if key and isinstance(item, dict) else item

    ranks = {_hashable(name(item)): rank for rank, item in enumerate(order)}
    places = {_hashable(name(item)): place for place, item in enumerate(before)}
    named = sorted((one for one in merged if _hashable(name(one)) in ranks), key=lambda one: ranks[_hashable(name(one))])
    own = [one for one in merged if _hashable(name(one)) not in ranks]
    found: list[Any] = []
    while named and own:
        place = places.get(_hashable(name(named[0])))
        own_place = places.get(_hashable(name(own[0])), len(before))
        found.append(own.pop(0) if place is not None and own_place < place else named.pop(0))
    return found + named + own


def _hashable(value: Any) -> Any:
    return repr(value) if isinstance(value, dict | list) else value


def _is_directive(key: str) -> bool:
    return key in (_DIRECTIVE, _RETAIN) or key.startswith((_ORDER, _REMOVE))


def _plain(value: Any) -> Any:
    """A value that replaces: without directives."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not _is_directive(key)}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---- JSON patch (RFC 6902)


class _TestFailed(Exception):
    """A `test` operation found another value."""


def json_patch(target: Object, operations: Any) -> Any:
    """`operations` applied in order to a copy of `target`; Refusal 422 when one cannot be, 400 when malformed."""
    if not isinstance(operations, list) or not all(isinstance(one, dict) for one in operations):
        raise bad_request("a JSON patch is a list of operations")
    if len(operations) > OPERATIONS_LIMIT:
        raise Refusal(413, "RequestEntityTooLarge", f"The allowed maximum operations in a JSON patch is {OPERATIONS_LIMIT}")
    document = copy.deepcopy(target)
    for one in operations:
        try:
            document = _operate(document, one)
        except _TestFailed as error:
            words = f"testing value {one['path']} failed: test failed"
            raise Refusal(422, "Invalid", f"the server rejected our request due to an error in our request: {words}") from error
        except (LookupError, TypeError, ValueError) as error:
            place = f'{one.get("op")} operation does not apply: doc is missing path: "{one.get("path")}": {error}'
            words = f"the server rejected our request due to an error in our request: {place}"
            raise Refusal(422, "Invalid", words) from error
    return document


def _operate(document: Any, one: Object) -> Any:
    operation, path = one.get("op"), _pointer(one.get("path"))
    if operation == "remove":
        return _remove(document, path)[0]
    if operation in ("add", "replace", "test"):
        if "value" not in one:
            raise ValueError("the operation has no value")
        value = copy.deepcopy(one["value"])
        if operation == "add":
            return _add(document, path, value)
        current = _at(document, path)
        if operation == "test":
            if not _same(current, value):
                raise _TestFailed
            return document
        return _add(_remove(document, path)[0], path, value) if path else value
    if operation in ("move", "copy"):
        source = _pointer(one.get("from"))
        if operation == "copy":
            return _add(document, path, copy.deepcopy(_at(document, source)))
        if path[: len(source)] == source and path != source:
            raise ValueError("a value cannot move into itself")
        document, value = _remove(document, source)
        return _add(document, path, value)
    raise ValueError(f"unknown operation {operation!r}")


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _pointer(text: Any) -> list[str]:
    """RFC 6901."""
    if text == "":
        return []
    if not isinstance(text, str) or not text.startswith("/"):
        raise ValueError("not a JSON pointer")
    return [part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/")]


def _index(holder: list[Any], part: str, *, end: bool = False) -> int:
    if end and part == "-":
        return len(holder)
    if not part.isdecimal() or (len(part) > 1 and part[0] == "0"):
        raise ValueError(f"{part!r} is no index")
    index = int(part)
    if index > len(holder) - (0 if end else 1):
        raise LookupError(f"index {index} is past the end")
    return index


def _at(document: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(document, list):
            document = document[_index(document, part)]
        elif isinstance(document, dict):
            document = document[part]
        else:
            raise LookupError(f"no {part!r} in a scalar")
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    holder = _at(document, path[:-1])
    if isinstance(holder, list):
        holder.insert(_index(holder, path[-1], end=True), value)
    elif isinstance(holder, dict):
        holder[path[-1]] = value
    else:
        raise LookupError(f"no {path[-1]!r} in a scalar")
    return document


def _remove(document: Any, path: list[str]) -> tuple[Any, Any]:
    """The document without what is at `path`, and that."""
    if not path:
        return None, document
    holder = _at(document, path[:-1])
    if isinstance(holder, list):
        return document, holder.pop(_index(holder, path[-1]))
    if isinstance(holder, dict):
        return document, holder.pop(path[-1])
    raise LookupError(f"no {path[-1]!r} in a scalar")
