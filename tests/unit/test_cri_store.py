"""What the CRI service keeps: what is waited for, and what only has to come in its turn."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from nacre.cri.store import ContainerRecord, Store

RECORD = ContainerRecord(
    id="c", sandbox="s", config=b"", name=("main", 0), image="i", image_reference="i:1", created_at=1, log_path=""
)


async def test_what_is_noted_is_in_memory_at_once_and_on_disk_before_what_comes_after(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "cri.db"))
    store.open()
    await store.put(RECORD)
    store.note(RECORD, started_at=7)
    assert store.containers["c"].started_at == 7
    await store.change(store.containers["c"], finished_at=9)
    store.close()
    kept = Store(str(tmp_path / "cri.db"))
    kept.open()
    kept.close()
    assert (kept.containers["c"].started_at, kept.containers["c"].finished_at) == (7, 9)


async def test_a_note_that_the_disk_refuses_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(str(tmp_path / "cri.db"))
    store.open()
    await store.put(RECORD)
    with closing(sqlite3.connect(tmp_path / "cri.db")) as other:
        other.execute("DROP TABLE object")
    store.note(RECORD, started_at=7)
    store.close()
    async with asyncio.timeout(5):
        while "no such table" not in caplog.text:
            await asyncio.sleep(0)
    assert store.containers["c"].started_at == 7
