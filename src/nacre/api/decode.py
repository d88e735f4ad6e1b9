"""Request bodies into trees: JSON, YAML and Kubernetes' protobuf, the first two with keys named twice marked."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from nacre.api.shape import Marked
from nacre.api.status import bad_request, unsupported_media

JSON, YAML, PROTOBUF = "application/json", "application/yaml", "application/vnd.kubernetes.protobuf"
KNOWN = (JSON, YAML, PROTOBUF)
BODY_LIMIT = 3 * 1024 * 1024  # bytes; Kubernetes' own
_YAML_NODES = 200_000  # after aliases are followed: a small text must not become a huge tree
_YAML_DEPTH = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def body(data: bytes, content_type: str) -> Any:
    """The tree in `data`; raises Refusal 400 or 415. An empty content type is JSON, as Kubernetes takes it."""
    media = content_type.split(";", 1)[0].strip().lower()
    if media in (JSON, ""):
        return from_json(data)
    if media in (YAML, "application/x-yaml", "text/yaml"):
        return from_yaml(data)
    if media == PROTOBUF:
        from nacre.api.protobuf import Malformed, decode_object

        try:
            return decode_object(data)
        except Malformed as error:
            raise bad_request(f"unable to decode protobuf: {error}") from error
    raise unsupported_media(media, KNOWN)


def from_json(data: bytes) -> Any:
    try:
        return _json(data)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error


def _json(data: bytes) -> Any:
    tree = json.loads(data.decode(), object_pairs_hook=_pairs, parse_constant=_no_constant)
    if _SURROGATE.search(data):
        msgspec.json.decode(data)  # refuses half of a pair, which no UTF-8 can hold; json.loads takes it
    return tree


def from_yaml(data: bytes) -> Any:
    """One document; JSON is YAML too and takes the quick way."""
    if data.lstrip()[:1] == b"{":
        try:
            return _json(data)
        except (ValueError, RecursionError):
            pass  # a flow mapping that is YAML only
    import yaml

    try:
        loader = _loader()(data)
        try:
            node = loader.get_single_node()
            return None if node is None else _Builder(loader).build(node, 0)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:  # the middle two: `!!int x`, `!!bool x`
        raise bad_request(f"error converting YAML to JSON: {' '.join(str(error).split())}") from error


def _loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Builder:
    """YAML nodes into a JSON tree: scalars by YAML 1.1's rules but dates and base 60, which stay strings, as Kubernetes reads them."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._nodes = loader, 0

    def build(self, node: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > _YAML_NODES or depth > _YAML_DEPTH:
            raise bad_request("error converting YAML to JSON: document contains excessive aliasing or nesting")
        if node.id == "sequence":
            return [self.build(item, depth + 1) for item in node.value]
        if node.id == "mapping":
            self._loader.flatten_mapping(node)  # "<<" merges
            return _pairs([(self._key(key), self.build(value, depth + 1)) for key, value in node.value])
        if node.tag == "tag:yaml.org,2002:timestamp" or (":" in node.value and not node.style):
            return node.value  # a date, or what YAML 1.1 takes for base 60
        return self._loader.construct_object(node)

    def _key(self, node: Any) -> str:
        key = self.build(node, 0) if node.id == "scalar" else None
        if isinstance(key, bool):
            return "true" if key else "false"
        if not isinstance(key, str | int | float):
            raise bad_request("error converting YAML to JSON: a mapping's key is not a scalar")
        return str(key)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    marked = Marked(found)
    marked.twice = tuple(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return marked


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
