"""Stacks of things to undo, and blocks made of generators, as contextlib has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nacre.linux import contexts


class Refused(Exception):
    pass


def told(library: Any, play: Callable[[Any, list[str]], None]) -> tuple[list[str], str]:
    """What `play` leaves in its list, and how it ends, with one library or the other."""
    heard: list[str] = []
    try:
        play(library, heard)
    except Exception as error:
        return heard, f"{error!r} after {error.__context__!r}"
    return heard, ""


def in_order(library: Any, heard: list[str]) -> None:
    with library.ExitStack() as stack:
        stack.callback(heard.append, "first")
        stack.enter_context(block(library, heard, "second"))
        stack.callback(heard.append, "third")


def moved_on(library: Any, heard: list[str]) -> None:
    with library.ExitStack() as stack:
        stack.callback(heard.append, "kept")
        kept = stack.pop_all()
        stack.callback(heard.append, "undone")
    heard.append("outside")
    kept.close()
    kept.close()


def raising_block(library: Any, heard: list[str]) -> None:
    with library.ExitStack() as stack:
        stack.callback(heard.append, "undone")
        with block(library, heard, "inner"):
            raise Refused("the block")


def raising_undo(library: Any, heard: list[str]) -> None:
    def refuse(word: str) -> None:
        raise Refused(word)

    with library.ExitStack() as stack:
        stack.callback(heard.append, "undone")
        stack.callback(refuse, "second undo")
        stack.callback(refuse, word="first undo")
        raise Refused("the block")


def entering_fails(library: Any, heard: list[str]) -> None:
    class Closed:
        def __enter__(self) -> None:
            raise Refused("closed")

        def __exit__(self, *_: object) -> None:
            heard.append("never")

    with library.ExitStack() as stack:
        stack.callback(heard.append, "undone")
        stack.enter_context(Closed())


def replaced(library: Any, heard: list[str]) -> None:
    def steps() -> Iterator[None]:
        try:
            yield
        except Refused as error:
            raise ValueError("translated") from error

    with library.contextmanager(steps)():
        raise Refused("the block")


def block(library: Any, heard: list[str], word: str) -> Any:
    def steps() -> Iterator[str]:
        heard.append(f"{word} entered")
        try:
            yield word
        except Refused as error:
            heard.append(f"{word} saw {error}")
            raise
        finally:
            heard.append(f"{word} left")

    return library.contextmanager(steps)()


@pytest.mark.parametrize("play", [in_order, moved_on, raising_block, raising_undo, entering_fails, replaced])
def test_undoing_goes_as_contextlib_does_it(play: Callable[[Any, list[str]], None]) -> None:
    assert told(contexts, play) == told(contextlib, play)


def test_a_second_yield_is_an_error() -> None:
    def steps() -> Iterator[None]:
        yield
        yield

    with pytest.raises(RuntimeError, match="one yield"), contexts.contextmanager(steps)():
        pass
