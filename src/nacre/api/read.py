"""Reading: one object, lists in pages, watches; each as plain objects, Table, or metadata alone."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from nacre.api import meta, objects, selectors, table
from nacre.api.kind import Kind, Object
from nacre.api.objects import encode
from nacre.api.status import Cause, Refusal, bad_request, expired, invalid, not_found
from nacre.api.store import Change, Entry, Expired, Store

BOOKMARK_S = 60.0
WATCH_S = 3600  # a watch without timeoutSeconds
_STALE_TOKEN = (
    "The provided continue parameter is too old to display a consistent list result. "
    "You can start a new list without the continue parameter."
)
_DIGITS = 18  # of a number that SQLite and every client can hold
_PAGE = 500  # entries read at once while a selector looks for matches


@dataclass(frozen=True, slots=True)
class Form:
    """What the Accept header asks for: `word` is "", "Table", "PartialObjectMetadata" or "PartialObjectMetadataList"."""

    word: str = ""
    version: str = "v1"
    include: str = "Metadata"


@dataclass(slots=True, kw_only=True)
class Query:
    """Where and what: the parsed parameters of a list or watch (meta/v1 ListOptions)."""

    kind: Kind
    namespace: str
    label_test: selectors.Test | None
    field_terms: list[tuple[str, bool, str]]
    limit: int = 0
    token: str = ""
    resource_version: str = ""
    match: str = ""  # resourceVersionMatch
    bookmarks: bool = False
    initial: bool | None = None  # sendInitialEvents
    timeout_s: float = WATCH_S
    form: Form = Form()

    @property
    def filtered(self) -> bool:
        return self.label_test is not None or bool(self.field_terms)

    @property
    def prefix(self) -> str:
        """Of the keys that can match: a single key when the name is given."""
        return self.kind.prefix(self.namespace)

    def matches(self, thing: Object) -> bool:
        if self.label_test is not None and not self.label_test(thing["metadata"].get("labels") or {}):
            return False
        kind = self.kind
        return all((kind.field(thing, name) == value) is equal for name, equal, value in self.field_terms)


def parse_query(kind: Kind, namespace: str, name: str, raw: dict[str, str], form: Form) -> Query:
    """Raises Refusal 400 for what cannot be read, in Kubernetes' words."""
    terms = selectors.fields(raw.get("fieldSelector", ""), kind.field_names)
    if name:
        terms.append(("metadata.name", True, name))
    timeout = _whole(raw, "timeoutSeconds", 0)
    initial = raw.get("sendInitialEvents")
    query = Query(
        kind=kind,
        namespace=namespace,
        label_test=selectors.labels(raw.get("labelSelector", "")),
        field_terms=terms,
        limit=_whole(raw, "limit", 0),
        token=raw.get("continue", ""),
        resource_version=raw.get("resourceVersion", ""),
        match=raw.get("resourceVersionMatch", ""),
        bookmarks=truth(raw.get("allowWatchBookmarks")),
        initial=None if initial is None else truth(initial),
        timeout_s=float(timeout) if timeout else float(WATCH_S),
        form=form,
    )
    if query.resource_version and not _is_whole(query.resource_version):
        raise bad_request(
            f'invalid resource version "{query.resource_version}": strconv.ParseUint: parsing "{query.resource_version}": invalid syntax'
        )
    return query


def truth(text: str | None) -> bool:
    """How Kubernetes reads a boolean parameter: present and not "false" or "0"."""
    return text is not None and text not in ("false", "0", "False")


def _whole(raw: dict[str, str], name: str, default: int) -> int:
    text = raw.get(name, "")
    if not text:
        return default
    if not _is_whole(text):
        raise bad_request(f"{name}: {text!r} is not a whole number")
    return int(text)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS


class Reader:
    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, kind: Kind, namespace: str, name: str, form: Form) -> bytes:
        entry = self._store.get(kind.key(namespace, name))
        if entry is None:
            raise not_found(kind, name)
        if not form.word:
            return objects.wire(kind, entry.value, entry.revision)
        thing = objects.load_entry(kind, entry)
        if form.word == "Table":
            list_meta = {"resourceVersion": str(entry.revision)}
            return encode(table.make(kind, [thing], list_meta, objects.now(), version=form.version, include=form.include))
        return encode(meta.partial(thing))

    # ---- lists

    def listing(self, query: Query) -> bytes:
        revision, after = self._start(query)
        try:
            entries, revision, remaining, last = self._collect(query, revision, after)
        except Expired as error:
            raise expired(
                _STALE_TOKEN if query.token else f"The resourceVersion for the provided list is too old: {revision}"
            ) from error
        list_meta: dict[str, Any] = {"resourceVersion": str(revision)}
        if remaining:
            list_meta["continue"] = base64.urlsafe_b64encode(json.dumps([revision, last]).encode()).decode()
            if not query.filtered:
                list_meta["remainingItemCount"] = remaining
        return self._listed(query, entries, list_meta)

    def entries(self, query: Query) -> list[Entry]:
        """All that match, newest state (deletecollection)."""
        return self._collect(query, 0, "")[0]

    def _start(self, query: Query) -> tuple[int, str]:
        """(revision to read at, 0 for the newest; key to go on after)."""
        if query.token:
            try:
                revision, after = msgspec.json.decode(base64.urlsafe_b64decode(query.token), type=tuple[int, str])
            except (ValueError, RecursionError) as error:
                raise bad_request("continue key is not valid: illegal token") from error
            if not after.startswith(query.prefix):
                raise bad_request("continue key is not valid")
            return revision, after
        wanted = int(query.resource_version or 0)
        if query.match == "Exact":
            if not wanted:
                raise _forbidden_match(query.kind, "resourceVersionMatch is forbidden unless resourceVersion is provided")
            return wanted, ""
        if query.match not in ("", "NotOlderThan"):
            raise bad_request(
                f'resourceVersionMatch: Unsupported value: "{query.match}": supported values: "", "Exact", "NotOlderThan"'
            )
        latest = self._store.newest() if wanted else 0
        if wanted > latest:
            message = f"Too large resource version: {wanted}, current: {latest}"
            details = {
                "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                "retryAfterSeconds": 1,
            }
            raise Refusal(504, "Timeout", f"Timeout: {message}", details)
        return 0, ""

    def _collect(self, query: Query, revision: int, after: str) -> tuple[list[Entry], int, int, str]:
        """(matching entries up to the limit, revision, how many may follow, last key looked at)."""
        if not query.filtered:
            page = self._store.range(query.prefix, after=after, limit=query.limit, revision=revision)
            return page.entries, page.revision, page.remaining, page.entries[-1].key if page.entries else ""
        if (single := self._single(query)) is not None:
            return single
        found: list[Entry] = []
        last = after
        while True:
            page = self._store.range(query.prefix, after=last, limit=_PAGE, revision=revision)
            revision = page.revision
            for index, entry in enumerate(page.entries):
                last = entry.key
                if query.matches(objects.load_entry(query.kind, entry)):
                    found.append(entry)
                if query.limit and len(found) == query.limit:
                    return found, revision, page.remaining + len(page.entries) - index - 1, last
            if not page.remaining:
                return found, revision, 0, last

    def _single(self, query: Query) -> tuple[list[Entry], int, int, str] | None:
        """A selection by name is one look-up."""
        names = [value for field, equal, value in query.field_terms if field == "metadata.name" and equal]
        if not names or (query.kind.namespaced and not query.namespace) or query.match == "Exact" or query.token:
            return None
        revision = self._store.newest()
        entry = self._store.get(query.kind.key(query.namespace, names[0]))
        if entry is None or not query.matches(objects.load_entry(query.kind, entry)):
            return [], revision, 0, ""
        return [entry], max(revision, entry.revision), 0, ""

    def _listed(self, query: Query, entries: list[Entry], list_meta: dict[str, Any]) -> bytes:
        kind, form = query.kind, query.form
        if form.word == "Table":
            things = (objects.load_entry(kind, entry) for entry in entries)
            return encode(table.make(kind, things, list_meta, objects.now(), version=form.version, include=form.include))
        if form.word:
            items = [meta.partial(objects.load_entry(kind, entry)) for entry in entries]
            return encode(
                {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": list_meta, "items": items}
            )
        head = {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": list_meta}
        items_data = b",".join(objects.wire(kind, entry.value, entry.revision) for entry in entries)
        return encode(head)[:-1] + b',"items":[' + items_data + b"]}"

    # ---- watches

    async def watch(self, query: Query) -> AsyncGenerator[bytes, None]:
        """Chunks of whole event lines; ends at the query's timeout, or with an ERROR event when history is lost."""
        lines = _Lines(query)
        start, initial = self._watch_start(query)
        if initial:
            entries, start, _, _ = self._collect(query, 0, "")
            opening = b"".join(lines.added(entry) for entry in entries)
            if query.initial:
                opening += lines.bookmark(start, ended=True)
            yield opening
        else:
            yield b""  # the answer's head goes out at once
        try:
            watch = self._store.watch(query.prefix, start)
        except Expired:
            yield lines.error(expired(f"too old resource version: {start}"))
            return
        clock = _Clock(query.timeout_s)
        try:
            while (wait_s := clock.wait(BOOKMARK_S)) > 0:
                changes = await watch.next(wait_s)
                chunk = b"".join(line for change in changes for line in lines.of(change))
                if not changes and query.bookmarks:
                    chunk = lines.bookmark(self._store.revision)
                if chunk:
                    yield chunk
        except Expired:
            yield lines.error(expired())
        finally:
            watch.close()

    def _watch_start(self, query: Query) -> tuple[int, bool]:
        """(revision to watch after, whether what exists is told first)."""
        if query.initial is not None and query.match != "NotOlderThan":
            raise _forbidden_match(query.kind, "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
        if query.initial is None and query.match:
            raise _forbidden_match(query.kind, "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided")
        wanted = int(query.resource_version or 0)
        if query.initial is not None:
            return wanted or self._store.revision, query.initial
        return wanted or self._store.revision, wanted == 0


def _forbidden_match(kind: Kind, words: str) -> Refusal:
    field = "sendInitialEvents" if "sendInitialEvents" in words else "resourceVersionMatch"
    refusal = invalid(kind, "", [Cause("FieldValueForbidden", field, f"Forbidden: {words}")])
    refusal.message = f'ListOptions.meta.k8s.io "" is invalid: {field}: Forbidden: {words}'
    return refusal


class _Clock:
    """Time left of a watch, by the event loop's clock."""

    def __init__(self, limit_s: float) -> None:
        self._time = asyncio.get_running_loop().time
        self._end = self._time() + limit_s

    def wait(self, most_s: float) -> float:
        return min(most_s, self._end - self._time())


class _Lines:
    """One watch's events as JSON lines. Plain forms are encoded once for all watchers (Change.memo)."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._columns = True  # the first Table alone has them

    def added(self, entry: Entry) -> bytes:
        kind = self._query.kind
        if not self._query.form.word:
            return _line("ADDED", objects.wire(kind, entry.value, entry.revision))
        return self._formed("ADDED", objects.load_entry(kind, entry))

    def of(self, change: Change) -> Iterator[bytes]:
        query = self._query
        kind = query.kind
        # after a removal the object is told as it was, at the removal's revision
        value = change.value if change.value is not None else change.previous.value if change.previous else b""
        word = "DELETED" if change.value is None else "MODIFIED" if change.previous else "ADDED"
        if query.filtered:
            now = change.value is not None and query.matches(objects.load(kind, change.value, change.revision))
            before = change.previous is not None and query.matches(objects.load_entry(kind, change.previous))
            if not now and not before:
                return
            if not now and change.previous is not None:
                value = change.previous.value
            word = "MODIFIED" if now and before else "ADDED" if now else "DELETED"
        if query.form.word:
            yield self._formed(word, objects.load(kind, value, change.revision))
            return
        if change.memo is None or change.memo[0] != (kind.path, word):
            change.memo = (kind.path, word), _line(word, objects.wire(kind, value, change.revision))
        yield change.memo[1]

    def bookmark(self, revision: int, *, ended: bool = False) -> bytes:
        kind = self._query.kind
        found: Object = {"kind": kind.name, "apiVersion": kind.api_version, "metadata": {"resourceVersion": str(revision)}}
        found["metadata"]["creationTimestamp"] = None
        if ended:
            found["metadata"]["annotations"] = {"k8s.io/initial-events-end": "true"}
        if self._query.form.word == "Table":
            found = table.make(
                kind, [], found["metadata"], objects.now(), version=self._query.form.version, columns=self._columns
            )
        elif self._query.form.word:
            found = meta.partial(found)
        return _line("BOOKMARK", encode(found))

    def error(self, refusal: Refusal) -> bytes:
        return _line("ERROR", encode(refusal.status()))

    def _formed(self, word: str, thing: Object) -> bytes:
        form = self._query.form
        if form.word != "Table":
            return _line(word, encode(meta.partial(thing)))
        list_meta = {"resourceVersion": thing["metadata"]["resourceVersion"]}
        made = table.make(
            self._query.kind,
            [thing],
            list_meta,
            objects.now(),
            version=form.version,
            include=form.include,
            columns=self._columns,
        )
        self._columns = False
        return _line(word, encode(made))


def _line(word: str, data: bytes) -> bytes:
    return b'{"type":"' + word.encode() + b'","object":' + data + b"}\n"
