"""What a long runtime call is busy with becomes words, each once; a runtime that has none for it is waited for in silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nacre.kubelet import waiting
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import PROGRESS, progress_of

SUBJECT = progress_of("handler", "kata")


class Runtime:
    """The far end of the wire: each Status takes the next of `infos`; the call waited for ends after the last one."""

    def __init__(self, *infos: str) -> None:
        self._infos = list(infos)
        self.over = asyncio.Event()

    async def Status(self, request: Any) -> Any:
        assert request.verbose
        info = self._infos.pop(0)
        if not self._infos:
            self.over.set()
        return cri.StatusResponse(info={PROGRESS: info} if info else {})

    async def call(self) -> str:
        await self.over.wait()
        return "made"


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_S", 0.001)


def doing(words: str, subject: str = SUBJECT) -> str:
    return json.dumps({subject: words})


def test_each_news_is_said_once_and_the_answer_comes_through() -> None:
    async def test() -> None:
        runtime, said = Runtime(doing("one"), doing("one"), doing("two"), doing("two")), list[str]()
        assert await waiting.told(runtime, SUBJECT, runtime.call(), said.append) == "made"  # type: ignore[arg-type]
        assert said == ["one", "two"]

    run(test)


@pytest.mark.parametrize("info", ["", "no JSON", "[]", doing("of others", "image x")])
def test_a_runtime_without_a_word_for_it_is_waited_for_in_silence(info: str) -> None:
    async def test() -> None:
        runtime, said = Runtime(info), list[str]()
        assert await waiting.told(runtime, SUBJECT, runtime.call(), said.append) == "made"  # type: ignore[arg-type]
        assert said == []

    run(test)


def test_what_nobody_wants_any_more_is_left_while_the_runtime_prepares_and_only_then() -> None:
    async def test() -> None:
        runtime = Runtime(doing("one"), "")
        with pytest.raises(waiting.Interrupted):
            await waiting.told(runtime, SUBJECT, runtime.call(), print, unwanted=lambda: True)  # type: ignore[arg-type]
        begun = Runtime("", "")
        assert await waiting.told(begun, SUBJECT, begun.call(), print, unwanted=lambda: True) == "made"  # type: ignore[arg-type]

    run(test)


def test_a_call_that_is_quick_is_never_asked_about() -> None:
    async def test() -> None:
        async def quick() -> int:
            return 7

        assert await waiting.told(None, SUBJECT, quick(), print) == 7  # type: ignore[arg-type]

    run(test)
