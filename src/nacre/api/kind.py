"""What a kind is to the server: one `Kind` per resource, filled in by the tables in `kinds/`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nacre.api import schema
from nacre.api.status import Cause, invalid_value, required

Object = dict[str, Any]

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
SUBDOMAIN_WORDS = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
LABEL_WORDS = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an "
    "alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the Table output; `priority` 1 shows with `-o wide` only."""

    name: str
    type: str = "string"
    format: str = ""
    priority: int = 0
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subresource:
    """`verbs` as discovery lists them; `name` is the kind its bodies have ("" for the parent's own)."""

    path: str
    verbs: tuple[str, ...]
    name: str = ""
    group: str = ""
    version: str = ""


STATUS = Subresource(path="status", verbs=("get", "patch", "update"))


def _nothing(_: Object) -> None:
    pass


def _nothing_update(_new: Object, _old: Object) -> None:
    pass


def _no_causes(_: Object) -> list[Cause]:
    return []


def _no_causes_update(_new: Object, _old: Object) -> list[Cause]:
    return []


def subdomain_name(name: str, where: str) -> list[Cause]:
    return check_name(name, where, DNS_SUBDOMAIN, SUBDOMAIN_WORDS, 253)


def label_name(name: str, where: str) -> list[Cause]:
    return check_name(name, where, DNS_LABEL, LABEL_WORDS, 63)


def path_name(name: str, where: str) -> list[Cause]:
    """What any name must be: one segment of a URL."""
    if name in (".", "..") or "/" in name or "%" in name:
        return [invalid_value(where, name, "may not contain '/' or '%', or be '.' or '..'")]
    return []


def check_name(name: str, where: str, pattern: re.Pattern[str], words: str, limit: int) -> list[Cause]:
    if not name:
        return [required(where)]
    causes = [] if len(name) <= limit else [invalid_value(where, name, f"must be no more than {limit} bytes")]
    return causes if pattern.fullmatch(name) else [*causes, invalid_value(where, name, words)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One resource. The functions get whole objects of the kind's structure:

    `defaults` fills in place what Kubernetes fills, before anything is merged; `check` and `check_update` (new, old) return the
    faults of a write; `row` gives the cells of `columns`; `fields` are the field selectors beyond metadata.name/namespace.
    """

    group: str
    version: str
    name: str
    plural: str
    singular: str
    struct_name: str
    namespaced: bool
    columns: tuple[Column, ...]
    row: Callable[[Object, datetime], list[Any]]
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    subresources: tuple[Subresource, ...] = ()
    defaults: Callable[[Object], None] = _nothing
    check: Callable[[Object], list[Cause]] = _no_causes
    check_update: Callable[[Object, Object], list[Cause]] = _no_causes_update
    check_name: Callable[[str, str], list[Cause]] = subdomain_name
    prepare_create: Callable[[Object], None] = _nothing  # before defaults: what a client may not set is reset
    fields: dict[str, Callable[[Object], str]] = field(default_factory=dict)
    counts_generations: bool = False  # metadata.generation follows the spec
    prepare_update: Callable[[Object, Object], None] = (
        _nothing_update  # (new, old): what an ordinary update may not touch is kept
    )
    returns_deleted: bool = False  # DELETE answers the object, not a Status
    stored_as: str = ""  # PREFIX of the keys when another kind's store is shared (events), with the conversions
    to_stored: Callable[[Object], Object] | None = None
    from_stored: Callable[[Object], Object] | None = None

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As messages name it: "pods", "leases.coordination.k8s.io"."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def path(self) -> str:
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"

    @property
    def has_status(self) -> bool:
        return STATUS in self.subresources

    @property
    def structure(self) -> schema.Struct:
        return schema.struct(self.struct_name)

    def prefix(self, namespace: str = "") -> str:
        """Of the storage keys of all objects, or of those in `namespace`."""
        base = self.stored_as or f"{self.group or 'core'}/{self.plural}"
        return f"{base}/{namespace}/" if namespace else f"{base}/"

    def key(self, namespace: str, name: str) -> str:
        return f"{self.prefix()}{namespace}/{name}"

    def field(self, thing: Object, name: str) -> str:
        """The text of a field selector's field."""
        if name == "metadata.name":
            return str(thing["metadata"]["name"])
        if name == "metadata.namespace":
            return str(thing["metadata"].get("namespace", ""))
        return self.fields[name](thing)

    @property
    def field_names(self) -> tuple[str, ...]:
        return ("metadata.name", "metadata.namespace", *self.fields)


def at(*path: str) -> Callable[[Object], str]:
    """A field selector's reader: the text at `path`, "" when unset."""

    def read(thing: Object) -> str:
        value: Any = thing
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool):
            return "true" if value else "false"
        return "" if value is None else str(value)

    return read


NAME = Column(name="Name", format="name", description="Name of the object, unique within its namespace.")
AGE = Column(name="Age", description="How long ago the object was created.")


ZERO_TIME = "0001-01-01T00:00:00Z"  # what Go writes for "none" where it must write something


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def age(text: str | None, now: datetime) -> str:
    """Kubernetes' short form of the time since `text` (RFC 3339): "5s", "3m20s", "5d2h"."""
    if not text or text == ZERO_TIME:
        return "<unknown>"
    return duration(int((now - instant(text)).total_seconds()))


def duration(seconds: int) -> str:
    """apimachinery, duration.HumanDuration: two units while the first is small, one afterwards."""
    if seconds < -1:
        return "<invalid>"
    seconds = max(seconds, 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return _two(minutes, "m", seconds % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    years = days // 365
    return _two(years, "y", days % 365, "d") if years < 8 else f"{years}y"


def _two(first: int, unit: str, second: int, lesser: str) -> str:
    return f"{first}{unit}{second}{lesser}" if second else f"{first}{unit}"


def created(thing: Object, now: datetime) -> str:
    return age(thing["metadata"].get("creationTimestamp"), now)
