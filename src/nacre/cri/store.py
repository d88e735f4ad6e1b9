"""What the CRI service was told and has told, kept through power loss: one SQLite database, one writer thread, grouped commits.

DATA/cri.db (WAL, synchronous=FULL), table `object`: kind ("sandbox" or "container"), id, data (JSON). Reads come from memory, which
holds every record; a write is acknowledged after the commit that carries it, and all writes that wait share one commit. A kill between
two commits leaves the last committed state; `recover` compares it with what lives.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from nacre.oci.errors import AlreadyExists, Failure, Invalid, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRecord:
    """One pod sandbox. `config` is the PodSandboxConfig as received."""

    id: str
    config: bytes
    handler: str
    name: tuple[str, str, str, int]  # name, namespace, uid, attempt
    created_at: int  # Unix time, ns
    ready: bool = True
    attachment: dict[str, Any] = field(default_factory=dict)  # network.Attachment as JSON; empty with the host's network
    failure: dict[str, Any] | None = None  # why it is not ready, when that was not asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRecord:
    """One container. `config` is the ContainerConfig as received; times are Unix time in ns, 0 for not yet."""

    id: str
    sandbox: str
    config: bytes
    name: tuple[str, int]  # name, attempt
    image: str  # image id
    image_reference: str  # the digest in the registry it was pulled from, else the id
    created_at: int
    log_path: str
    stop_signal: str = ""
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    user: tuple[int, int, tuple[int, ...]] = (0, 0, ())
    image_name: str = ""  # the name asked for, or another that the image has

    @property
    def state(self) -> str:
        return "exited" if self.finished_at else "running" if self.started_at else "created"


class StoreFailed(Failure):
    """What a client is to be told could not be kept."""


log = logging.getLogger("nacre.cri")
_INSERT = "INSERT OR REPLACE INTO object VALUES (?, ?, ?)"
Record = SandboxRecord | ContainerRecord
Found = TypeVar("Found", SandboxRecord, ContainerRecord)
_KINDS: dict[str, type[SandboxRecord] | type[ContainerRecord]] = {"sandbox": SandboxRecord, "container": ContainerRecord}


class Store:
    """Every record, in memory and on disk. Used from the event loop's thread alone."""

    def __init__(self, path: str) -> None:
        self.sandboxes: dict[str, SandboxRecord] = {}
        self.containers: dict[str, ContainerRecord] = {}
        self._path = path
        self._work: queue.SimpleQueue[tuple[str, tuple[Any, ...], asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._names: dict[tuple[Any, ...], str] = {}  # reserved name → holder's id
        self._thread = threading.Thread(target=self._write, name="cri-store")

    def open(self) -> None:
        """Read everything, then start the writer. Raises sqlite3.Error."""
        database = sqlite3.connect(self._path)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(
            "CREATE TABLE IF NOT EXISTS object (kind TEXT, id TEXT, data BLOB, PRIMARY KEY (kind, id)) WITHOUT ROWID"
        )
        for kind, _id, data in database.execute("SELECT kind, id, data FROM object"):
            record = msgspec.json.decode(data, type=_KINDS[kind])
            self._table(record)[record.id] = record
            self._names[_name(record)] = record.id
        database.close()
        self._thread.start()

    def close(self) -> None:
        """Commit what waits and end the writer."""
        self._work.put(None)
        self._thread.join()

    def reserve(self, name: tuple[Any, ...], holder: str, what: str) -> None:
        """Take a name for `holder` before anything is made. Raises AlreadyExists naming who has it."""
        taken = self._names.setdefault(name, holder)
        if taken != holder:
            raise AlreadyExists(
                what=what,
                cause=f"the name {'_'.join(str(part) for part in name)} is reserved for {taken}{self._age(taken)}",
                remedy="remove that one first, or use the next attempt number",
            )

    def release(self, name: tuple[Any, ...]) -> None:
        self._names.pop(name, None)

    async def put(self, record: Record) -> None:
        """Returns when `record` is committed. Memory has it at once, so later calls of this loop see it."""
        table, former = self._table(record), self._table(record).get(record.id)
        table[record.id] = record
        data = msgspec.json.encode(asdict(record))
        try:
            await self._submit(_INSERT, (_kind(record), record.id, data))
        except StoreFailed:
            if former is None:
                table.pop(record.id, None)  # a new one was not told to anybody; of a known one memory has the truth
            raise

    def note(self, record: Record, **facts: Any) -> None:
        """`change` that nobody waits for: memory has it, the next commit takes it along, and a disk that refuses it is logged."""
        changed = replace(record, **facts)
        self._table(changed)[changed.id] = changed
        future = self._enqueue(_INSERT, (_kind(changed), changed.id, msgspec.json.encode(asdict(changed))))
        future.add_done_callback(self._noted)

    def _noted(self, future: asyncio.Future[None]) -> None:
        if error := future.exception():
            log.error("keep what pods and containers are in %s: %s", self._path, error)

    async def change(self, record: Record, **facts: Any) -> None:
        await self.put(replace(record, **facts))

    async def remove(self, *records: Record) -> None:
        """All of them in one commit: a container never outlives its sandbox."""
        for record in records:
            self._table(record).pop(record.id, None)
            self.release(_name(record))
        marks = ", ".join("?" * len(records))
        await self._submit(f"DELETE FROM object WHERE id IN ({marks})", tuple(record.id for record in records))

    def sandbox(self, prefix: str) -> SandboxRecord:
        """By id or a prefix of one only. Raises NotFound, Invalid for an ambiguous prefix."""
        return _find(self.sandboxes, prefix, "pod sandbox")

    def container(self, prefix: str) -> ContainerRecord:
        return _find(self.containers, prefix, "container")

    def containers_of(self, sandbox: str) -> list[ContainerRecord]:
        return [record for record in self.containers.values() if record.sandbox == sandbox]

    def _table(self, record: Record) -> dict[str, Any]:
        return self.sandboxes if isinstance(record, SandboxRecord) else self.containers

    def _age(self, holder: str) -> str:
        known = self.sandboxes.get(holder) or self.containers.get(holder)
        return "" if known else ", which is still being made"

    def _enqueue(self, statement: str, values: tuple[Any, ...]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._work.put((statement, values, future))
        return future

    async def _submit(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            await self._enqueue(statement, values)
        except sqlite3.Error as error:
            raise StoreFailed(
                what=f"keep what pods and containers are in {self._path}",
                cause=str(error),
                remedy="free space on that file system" if "full" in str(error) else "",
            ) from error

    def _write(self) -> None:
        database = sqlite3.connect(self._path, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        while (first := self._work.get()) is not None:
            group, ended = [first], False
            while not self._work.empty():
                following = self._work.get()
                if following is None:
                    ended = True
                    break
                group.append(following)
            self._commit(database, group)
            if ended:
                break
        database.close()

    def _commit(self, database: sqlite3.Connection, group: list[tuple[str, tuple[Any, ...], asyncio.Future[None]]]) -> None:
        error: sqlite3.Error | None = None
        try:
            database.execute("BEGIN")
            for statement, values, _future in group:
                database.execute(statement, values)
            database.execute("COMMIT")
        except sqlite3.Error as failed:
            error = failed
            if database.in_transaction:
                database.execute("ROLLBACK")
        self._loop.call_soon_threadsafe(_settle, [future for _statement, _values, future in group], error)


def _settle(futures: list[asyncio.Future[None]], error: sqlite3.Error | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _kind(record: Record) -> str:
    return "sandbox" if isinstance(record, SandboxRecord) else "container"


def _name(record: Record) -> tuple[Any, ...]:
    return record.name if isinstance(record, SandboxRecord) else (record.sandbox, *record.name)


def _find(table: dict[str, Found], prefix: str, kind: str) -> Found:
    if prefix in table:
        return table[prefix]
    found = (pair for pair in table.items() if prefix and pair[0].startswith(prefix))
    first, second = next(found, None), next(found, None)
    if first is None:
        raise NotFound(what=f"find {kind} {prefix[:16]}", cause="there is none of that id")
    if second is not None:
        raise Invalid(what=f"find {kind} {prefix[:16]}", cause=f"the prefix fits {first[0][:16]} and {second[0][:16]} at least")
    return first[1]
