"""The store: revisions, conditions, watches, lists of the past, compaction, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nacre.api import store as storage
from nacre.api.store import Expired, Mismatch, SqliteStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    found = SqliteStore(f"{tmp_path}/api.db")
    yield found
    found.close()


async def test_every_write_has_a_revision_of_its_own(store: SqliteStore) -> None:
    first = await store.put("pods/a", b"1", expect=0)
    second = await store.put("pods/b", b"2", expect=0)
    assert second == first + 1
    entry = store.get("pods/a")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"1", first)


async def test_a_write_whose_condition_fails_changes_nothing(store: SqliteStore) -> None:
    first = await store.put("a/a", b"1", expect=0)
    with pytest.raises(Mismatch) as caught:
        await store.put("a/a", b"2", expect=0)
    assert caught.value.found is not None
    with pytest.raises(Mismatch):
        await store.put("a/a", b"2", expect=first + 5)
    with pytest.raises(Mismatch):
        await store.remove("a/b")
    assert store.newest() == first


async def test_of_many_at_once_one_wins(store: SqliteStore) -> None:
    outcomes = await asyncio.gather(*(store.put("a/x", str(n).encode(), expect=0) for n in range(50)), return_exceptions=True)
    assert sum(isinstance(one, int) for one in outcomes) == 1


async def test_a_watch_tells_each_change_once_from_any_revision(store: SqliteStore) -> None:
    start = store.newest()
    await store.put("a/1", b"x")
    watch = store.watch("a/", start)
    late = await store.put("a/2", b"y")
    await store.put("b/1", b"elsewhere")
    await store.remove("a/1")
    seen = []
    while len(seen) < 3:
        seen += await watch.next(5)
    assert [(change.key, change.value) for change in seen] == [("a/1", b"x"), ("a/2", b"y"), ("a/1", None)]
    assert seen[2].previous is not None and seen[2].previous.value == b"x"
    watch.close()
    again = store.watch("a/", late)
    assert [change.key for change in await again.next(5)] == ["a/1"]
    again.close()


async def test_a_watch_that_lags_is_told_so(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WATCH_QUEUE", 3)
    watch = store.watch("a/", store.newest())
    for number in range(5):
        await store.put(f"a/{number}", b"")
    with pytest.raises(Expired):
        await watch.next(5)
    watch.close()


async def test_a_list_of_the_past_is_what_it_was(store: SqliteStore) -> None:
    for name in "abcd":
        await store.put(f"k/{name}", b"old")
    then = store.newest()
    await store.put("k/b", b"new")
    await store.remove("k/c")
    await store.put("k/bb", b"new")
    page = store.range("k/", limit=2, revision=then)
    assert [entry.key for entry in page.entries] == ["k/a", "k/b"]
    assert page.entries[1].value == b"old"
    assert page.remaining == 2
    rest = store.range("k/", after="k/b", limit=2, revision=then)
    assert [(entry.key, entry.value) for entry in rest.entries] == [("k/c", b"old"), ("k/d", b"old")]
    assert [entry.key for entry in store.range("k/").entries] == ["k/a", "k/b", "k/bb", "k/d"]


async def test_history_is_compacted_and_what_needs_it_expires(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOG_KEPT_MAX", 3)
    start = store.newest()
    for number in range(9):
        await store.put("k/a", str(number).encode())
    await store.compact()
    with pytest.raises(Expired):
        store.watch("k/", start)
    with pytest.raises(Expired):
        store.range("k/", revision=start + 1)
    assert store.range("k/").entries[0].value == b"8"
    with pytest.raises(Expired):
        store.watch("k/", store.newest() + 100)


async def test_what_was_told_is_there_after_a_restart(tmp_path: Path) -> None:
    first = SqliteStore(f"{tmp_path}/api.db")
    revision = await first.put("k/a", b"1")
    first.close()
    second = SqliteStore(f"{tmp_path}/api.db")
    assert second.newest() == revision
    assert await second.put("k/b", b"2") == revision + 1
    second.close()
