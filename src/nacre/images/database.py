"""What is known of the content: images, their names, unfinished pulls. DATA/images/images.db, SQLite.

    images  id (configuration's digest), document (an Image without its names), hidden: removed but under a container
    names   name → image: references `repo:tag` and digests `repo@sha256:…`
    leases  unfinished pulls: the blobs that outlive a failure for a while, so that the next try continues

SQLite because several processes write it (the daemon; `nacre image` beside it) and a kill between any two steps must leave the
old rows or the new; see docs/decisions. Commits are durable (synchronous=FULL) and rare. Reads come from an index in memory,
rebuilt when SQLite's data_version says that another process has committed.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nacre.images.model import Descriptor, Image, Layer, is_digest
from nacre.oci.errors import Failure

VERSION = 1
LEASE_S = 3600
_SCHEMA = """
CREATE TABLE images (id TEXT PRIMARY KEY, document TEXT NOT NULL, hidden INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE names (name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE) WITHOUT ROWID;
CREATE INDEX names_of_image ON names (image);
CREATE TABLE leases (name TEXT PRIMARY KEY, digests TEXT NOT NULL, until INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(slots=True)
class Index:
    """All rows, as the store's quick questions want them."""

    images: dict[str, Image] = field(default_factory=dict)  # by id
    hidden: dict[str, Image] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # reference or digest → id


class Database:
    """One connection, used by one thread at a time under a lock; never carried over a fork."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._seen = -1
        self._connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(path)
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, path: str) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("BEGIN IMMEDIATE")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.strip().split(";\n"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={VERSION}")
        self._connection.execute("COMMIT")
        if version > VERSION:
            raise Failure(
                what=f"open {path}",
                cause=f"it is of version {version}, this nacre knows {VERSION}",
                remedy="use the newer nacre that wrote it",
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def index(self) -> Index:
        """The rows as they are now; a few microseconds when nothing has changed."""
        with self._lock:
            (seen,) = self._connection.execute("PRAGMA data_version").fetchone()
            if self._index is None or seen != self._seen:
                self._index, self._seen = self._read(), seen
            return self._index

    def _read(self) -> Index:
        index = Index()
        names: dict[str, list[str]] = {}
        for name, image in self._connection.execute("SELECT name, image FROM names ORDER BY name"):
            index.names[name] = image
            names.setdefault(image, []).append(name)
        for id, document, hidden in self._connection.execute("SELECT id, document, hidden FROM images ORDER BY id"):
            image = _decode(id, json.loads(document), names.get(id, []))
            (index.hidden if hidden else index.images)[id] = image
        return index

    def _write(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """One durable transaction."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in statements:
                    self._connection.execute(statement, values)
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            finally:
                self._index = None

    def record(self, image: Image, *, lease: str = "") -> None:
        """Image, names and the end of its lease in one commit; a name that was another image's moves here."""
        names = (*image.references, *image.digests)
        insert = (
            "INSERT INTO images (id, document, hidden) VALUES (?, ?, 0)"
            " ON CONFLICT (id) DO UPDATE SET document = excluded.document, hidden = 0"
        )
        self._write(
            (insert, (image.id, json.dumps(_encode(image)))),
            *(("INSERT OR REPLACE INTO names (name, image) VALUES (?, ?)", (name, image.id)) for name in names),
            ("DELETE FROM leases WHERE name = ?", (lease,)),
        )

    def pin(self, image_id: str, *, pinned: bool) -> None:
        image = self.index().images[image_id]
        document = json.dumps(_encode(replace(image, pinned=pinned)))
        self._write(("UPDATE images SET document = ? WHERE id = ?", (document, image_id)))

    def forget_name(self, name: str) -> None:
        self._write(("DELETE FROM names WHERE name = ?", (name,)))

    def hide(self, image_id: str) -> None:
        """Take away all its names; the row stays for as long as a container's root is made of it."""
        self._write(
            ("DELETE FROM names WHERE image = ?", (image_id,)),
            ("UPDATE images SET hidden = 1 WHERE id = ?", (image_id,)),
        )

    def drop(self, image_ids: Iterable[str]) -> None:
        self._write(*(("DELETE FROM images WHERE id = ?", (image_id,)) for image_id in image_ids))

    def lease(self, name: str, digests: Iterable[str]) -> None:
        until = int(time.time()) + LEASE_S
        self._write(("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", (name, json.dumps(sorted(digests)), until)))

    def end_lease(self, name: str) -> None:
        self._write(("DELETE FROM leases WHERE name = ?", (name,)))

    def leased(self) -> set[str]:
        """Digests that unfinished pulls of the last hour want kept."""
        with self._lock, closing(self._connection.cursor()) as cursor:
            rows = cursor.execute("SELECT digests FROM leases WHERE until > ?", (int(time.time()),)).fetchall()
        return {digest for (digests,) in rows for digest in json.loads(digests)}


def _encode(image: Image) -> dict[str, Any]:
    document = asdict(image)
    for key in ("id", "references", "digests"):
        del document[key]
    return document


def _decode(id: str, document: dict[str, Any], names: list[str]) -> Image:
    layers = tuple(Layer(**{**layer, "blob": Descriptor(**layer["blob"])}) for layer in document.pop("layers"))
    digests = tuple(name for name in names if is_digest(name.rpartition("@")[2]))
    return Image(
        id=id,
        references=tuple(name for name in names if name not in digests),
        digests=digests,
        layers=layers,
        manifest=Descriptor(**document.pop("manifest")),
        config_blob=Descriptor(**document.pop("config_blob")),
        **document,
    )
