"""Links are deleted in the background, and whoever asked is told."""

from __future__ import annotations

import threading

import pytest

from nacre.network.builtin import _Remover


def test_everyone_who_asks_for_the_same_link_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`collect` sees a link that `detach` has just asked for: the address of that sandbox was never freed then."""
    go = threading.Event()
    monkeypatch.setattr(_Remover, "_delete", lambda self, names: go.wait(30))
    remover, told = _Remover(0), list[str]()
    remover.add("busy", lambda: told.append("busy"))
    remover.add("link", lambda: told.append("detached"))
    remover.add("link", lambda: told.append("collected"))
    go.set()
    remover.settle()
    assert sorted(told) == ["busy", "collected", "detached"]
