"""Where objects live: keys, values, and one revision that counts every write of the node.

`Store` is the interface the API is written against (SQLite now; etcd's model of key ranges, compare-and-swap and watch from a
revision fits behind it). `SqliteStore` owns `api.db`:

    objects(key, revision, value)                       what is
    log(revision, key, value, previous…, at_s)          what happened, for watches and for lists at an older revision
    facts(name, value)                                  "compacted": no revision at or below it can be watched from

One thread writes, in groups: all that waits is one transaction and one sync (WAL, synchronous=FULL), and only then answered, so
what a client was told survives power loss. A kill leaves whole transactions. Reads run on the event loop's own connection.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nacre.oci.errors import Failure

LOG_KEPT_S, LOG_KEPT_MIN, LOG_KEPT_MAX = 300.0, 1000, 10000  # revisions a watch may start from: by age, but within these counts
WATCH_QUEUE = 4096  # changes a slow watcher may lag behind before it is told Expired
FORMAT = 1  # PRAGMA user_version of the tables


class StorageFailed(Failure):
    """The database refused: full disk, I/O error; nothing of the request was kept."""


class Mismatch(Exception):
    """A conditional write met another state: `found` is what is there, None for nothing."""

    def __init__(self, found: Entry | None) -> None:
        super().__init__(found)
        self.found = found


class Expired(Exception):
    """The revision asked for has been compacted, or is not of this store's history."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: bytes
    revision: int  # of the write that gave the key this value


@dataclass(slots=True, eq=False)
class Change:
    """One write: `value` None is a removal. `memo` is room for what readers derive from it once."""

    key: str
    revision: int
    value: bytes | None
    previous: Entry | None
    memo: Any = None


@dataclass(frozen=True, slots=True)
class Page:
    entries: list[Entry]
    revision: int  # the state of the whole store that `entries` are of
    remaining: int  # entries of the range after these


class Watch:
    """Changes under a prefix, in order, none twice and none missing; made by Store.watch, ended by `close`."""

    def __init__(self, store: SqliteStore, prefix: str, after: int) -> None:
        self._store, self._prefix, self._after = store, prefix, after
        self._waiting: deque[Change] = deque()
        self._wake = asyncio.Event()
        self._lost = False

    async def next(self, timeout_s: float | None = None) -> list[Change]:
        """The changes since the last call, waiting for the first; empty after `timeout_s`. Raises Expired if it lagged."""
        if not self._waiting and not self._lost:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                pass  # what came while this task was being woken is still told
        self._wake.clear()
        if self._lost:
            raise Expired
        changes = list(self._waiting)
        self._waiting.clear()
        return changes

    def offer(self, change: Change) -> None:
        if change.revision <= self._after or not change.key.startswith(self._prefix):
            return
        if len(self._waiting) >= WATCH_QUEUE:
            self._lost = True
            self._waiting.clear()
        else:
            self._waiting.append(change)
        self._wake.set()

    def close(self) -> None:
        self._store.forget(self)


class Store(Protocol):
    @property
    def revision(self) -> int: ...
    def get(self, key: str) -> Entry | None: ...
    def range(self, prefix: str, *, after: str = "", limit: int = 0, revision: int = 0) -> Page: ...
    def newest(self) -> int: ...
    def count(self, prefix: str) -> int: ...
    async def put(self, key: str, value: bytes, *, expect: int | None = None) -> int: ...
    async def remove(self, key: str, *, expect: int | None = None) -> int: ...
    def watch(self, prefix: str, after: int) -> Watch: ...
    async def compact(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Write:
    key: str
    value: bytes | None
    expect: int | None
    done: asyncio.Future[int]


@dataclass(slots=True)
class _Task:
    act: Callable[[sqlite3.Connection], None]
    done: asyncio.Future[int]


class SqliteStore:
    """Store in the file `path`; made and used on one event loop, which `close` leaves without a thread."""

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._loop = asyncio.get_running_loop()
        self._path = path
        self._watches: set[Watch] = set()
        self._queue: queue.SimpleQueue[_Write | _Task | None] = queue.SimpleQueue()
        self._create()
        self._reader = sqlite3.connect(path, isolation_level=None)
        self._reader.execute("PRAGMA cache_size=-2000")
        self._revision = self._latest()
        self._writer = threading.Thread(target=self._write_all, name="api-store", args=(self._revision,), daemon=True)
        self._writer.start()

    @property
    def revision(self) -> int:
        """The newest revision that watchers have been told."""
        return self._revision

    def get(self, key: str) -> Entry | None:
        row = self._reader.execute("SELECT key, value, revision FROM objects WHERE key = ?", (key,)).fetchone()
        return None if row is None else Entry(*row)

    def range(self, prefix: str, *, after: str = "", limit: int = 0, revision: int = 0) -> Page:
        """Entries whose key starts with `prefix` and is greater than `after`, in order, `limit` at most (0: all).

        `revision` 0 is the newest state, else the state at that revision. Raises Expired when it is compacted.
        """
        low, high = max(prefix, after + "\0" if after else ""), _end(prefix)
        self._reader.execute("BEGIN")
        try:
            latest = self._latest()
            if not revision or revision == latest:
                rows = self._select(low, high, limit + 1 if limit else -1)
                more = self._tally(rows[limit].key, high) if limit and len(rows) > limit else 0
                return Page(rows[:limit] if limit else rows, latest, more)
            if revision <= self._compacted() or revision > latest:
                raise Expired
            rows = self._as_of(revision, low, high)
        finally:
            self._reader.execute("COMMIT")
        kept = rows[:limit] if limit else rows
        return Page(kept, revision, len(rows) - len(kept))

    def newest(self) -> int:
        """The newest revision on disk; watchers may be about to hear of it."""
        return self._latest()

    def count(self, prefix: str) -> int:
        return self._tally(prefix, _end(prefix))

    async def put(self, key: str, value: bytes, *, expect: int | None = None) -> int:
        """Give `key` the value; returns the write's revision once it is on disk.

        `expect` is the revision the key must have, 0 for "not there"; else Mismatch. Raises StorageFailed.
        """
        return await self._submit(key, value, expect)

    async def remove(self, key: str, *, expect: int | None = None) -> int:
        """Remove `key` (Mismatch when it is not there or not at `expect`); returns the removal's revision."""
        return await self._submit(key, None, expect)

    def watch(self, prefix: str, after: int) -> Watch:
        """The changes under `prefix` after revision `after`; raises Expired when they are no longer known."""
        if after < self._compacted() or after > self._latest():
            raise Expired
        watch = Watch(self, prefix, after)
        query = (
            "SELECT key, revision, value, previous_revision, previous FROM log "
            "WHERE revision > ? AND revision <= ? AND key >= ? AND key < ? ORDER BY revision"
        )
        for row in self._reader.execute(query, (after, self._revision, prefix, _end(prefix))):
            watch.offer(_change(*row))
        self._watches.add(watch)
        return watch

    def forget(self, watch: Watch) -> None:
        self._watches.discard(watch)

    async def compact(self) -> None:
        """Drop history that no watch needs any more (LOG_KEPT_*)."""
        done: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(_Task(_compact, done))
        await done

    def close_writer(self) -> None:
        """Finish what waits and end the writer; blocks, so call it in a thread, then `close` on the loop."""
        self._queue.put(None)
        self._writer.join()

    def close(self) -> None:
        if self._writer.is_alive():
            self.close_writer()
        self._reader.close()

    # ---- reading

    def _latest(self) -> int:
        row = self._reader.execute("SELECT max(revision) FROM log").fetchone()
        return int(row[0])

    def _compacted(self) -> int:
        return int(self._reader.execute("SELECT value FROM facts WHERE name = 'compacted'").fetchone()[0])

    def _select(self, low: str, high: str, limit: int) -> list[Entry]:
        query = "SELECT key, value, revision FROM objects WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
        return [Entry(*row) for row in self._reader.execute(query, (low, high, limit))]

    def _tally(self, low: str, high: str) -> int:
        return int(self._reader.execute("SELECT count(*) FROM objects WHERE key >= ? AND key < ?", (low, high)).fetchone()[0])

    def _as_of(self, revision: int, low: str, high: str) -> list[Entry]:
        """The range at `revision`: today's, with the first later change of each key undone."""
        state = {entry.key: entry for entry in self._select(low, high, -1)}
        query = (
            "SELECT key, min(revision), previous_revision, previous FROM log "
            "WHERE revision > ? AND key >= ? AND key < ? GROUP BY key"
        )
        for key, _, previous_revision, previous in self._reader.execute(query, (revision, low, high)):
            if previous is None:
                state.pop(key, None)
            else:
                state[key] = Entry(key, previous, previous_revision)
        return [state[key] for key in sorted(state)]

    # ---- writing

    async def _submit(self, key: str, value: bytes | None, expect: int | None) -> int:
        done: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(_Write(key, value, expect, done))
        return await done

    def _create(self) -> None:
        with sqlite3.connect(self._path, isolation_level=None) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT):
                cause = f"{self._path} has format {found}, this nacre writes {FORMAT}"
                raise StorageFailed(what="open the API's storage", cause=cause, remedy="run the nacre that wrote it")
            connection.executescript(
                f"""BEGIN;
                CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, revision INTEGER NOT NULL, value BLOB NOT NULL);
                CREATE TABLE IF NOT EXISTS log (revision INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB,
                    previous_revision INTEGER, previous BLOB, at_s REAL NOT NULL);
                CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
                INSERT OR IGNORE INTO facts VALUES ('compacted', 0);
                INSERT INTO log SELECT 1, '', NULL, NULL, NULL, 0 WHERE NOT EXISTS (SELECT 1 FROM log);
                PRAGMA user_version={FORMAT};
                COMMIT;"""
            )
        connection.close()
        os.chmod(self._path, 0o600)

    def _write_all(self, revision: int) -> None:
        """The writer thread: groups until a None comes."""
        connection = sqlite3.connect(self._path, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA cache_size=-2000")
        ended = False
        while not ended:
            group = [self._queue.get()]
            while not self._queue.empty():
                group.append(self._queue.get())
            ended = None in group
            revision = self._write_group(connection, [item for item in group if item is not None], revision)
        connection.close()

    def _write_group(self, connection: sqlite3.Connection, group: list[_Write | _Task], revision: int) -> int:
        """One transaction; returns the newest revision. Answers and changes go to the loop after the commit."""
        answers: list[tuple[asyncio.Future[int], int | Exception]] = []
        changes: list[Change] = []
        before = revision
        try:
            connection.execute("BEGIN IMMEDIATE")
            for item in group:
                if isinstance(item, _Task):
                    item.act(connection)
                    answers.append((item.done, 0))
                    continue
                try:
                    changes.append(_apply(connection, item, revision + 1))
                except Mismatch as mismatch:
                    answers.append((item.done, mismatch))
                else:
                    revision += 1
                    answers.append((item.done, revision))
            connection.execute("COMMIT")
        except Exception as error:  # whatever it is, the thread lives on: without it no write would ever be answered
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            cause = f"sqlite: {error}" if isinstance(error, sqlite3.Error) else f"{type(error).__name__}: {error}"
            remedy = "free space in the data directory" if "full" in str(error) else ""
            failure = StorageFailed(what="write to the API's storage", cause=cause, remedy=remedy)
            answers, changes, revision = [(item.done, failure) for item in group], [], before
        self._loop.call_soon_threadsafe(self._committed, answers, changes)
        return revision

    def _committed(self, answers: list[tuple[asyncio.Future[int], int | Exception]], changes: list[Change]) -> None:
        for change in changes:
            self._revision = change.revision
            for watch in self._watches:
                watch.offer(change)
        for done, answer in answers:
            if done.done():
                continue  # its client went away
            if isinstance(answer, Exception):
                done.set_exception(answer)
            else:
                done.set_result(answer)


def _apply(connection: sqlite3.Connection, write: _Write, revision: int) -> Change:
    row = connection.execute("SELECT key, value, revision FROM objects WHERE key = ?", (write.key,)).fetchone()
    found = None if row is None else Entry(*row)
    at = 0 if found is None else found.revision
    if (write.expect is not None and write.expect != at) or (write.value is None and found is None):
        raise Mismatch(found)
    if write.value is None:
        connection.execute("DELETE FROM objects WHERE key = ?", (write.key,))
    else:
        connection.execute(
            "INSERT INTO objects VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET revision = excluded.revision, value = excluded.value",
            (write.key, revision, write.value),
        )
    previous = (None, None) if found is None else (found.revision, found.value)
    connection.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)", (revision, write.key, write.value, *previous, time.time()))
    return Change(write.key, revision, write.value, found)


def _compact(connection: sqlite3.Connection) -> None:
    latest = connection.execute("SELECT max(revision) FROM log").fetchone()[0]
    aged = connection.execute("SELECT max(revision) FROM log WHERE at_s < ?", (time.time() - LOG_KEPT_S,)).fetchone()[0] or 0
    upto = max(min(aged, latest - LOG_KEPT_MIN), latest - LOG_KEPT_MAX)
    if upto > 0:
        connection.execute("DELETE FROM log WHERE revision <= ?", (upto,))
        connection.execute("UPDATE facts SET value = ? WHERE name = 'compacted' AND value < ?", (upto, upto))


def _change(key: str, revision: int, value: bytes | None, previous_revision: int | None, previous: bytes | None) -> Change:
    before = None if previous is None or previous_revision is None else Entry(key, previous, previous_revision)
    return Change(key, revision, value, before)


def _end(prefix: str) -> str:
    """The least string greater than every string that starts with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
