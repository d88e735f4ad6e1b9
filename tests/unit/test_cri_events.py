"""GetContainerEvents towards a caller that does not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from nacre.cri import runtime
from nacre.wire import cri_pb2 as cri


class Pods:
    """What the method asks of cri.pods."""

    store = None

    def __init__(self) -> None:
        self.listeners: list[Callable[[str, Any], None]] = []

    def tell(self, event: str, record: Any) -> None:
        for listener in list(self.listeners):
            listener(event, record)


class Context:
    """The wire's far end: notes how the call was ended."""

    async def abort(self, code: grpc.StatusCode, words: str) -> None:
        raise RuntimeError(code, words)


async def test_a_caller_that_does_not_read_is_cut_off_and_costs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "EVENTS_KEPT", 10)
    pods = Pods()
    service = runtime.RuntimeService(pods, None)  # type: ignore[arg-type]
    reading = asyncio.ensure_future(anext(service.GetContainerEvents(cri.GetEventsRequest(), Context())))
    await asyncio.sleep(0)
    assert len(pods.listeners) == 1
    for _ in range(50):
        pods.tell("created", "a record that is no container's")
    assert not pods.listeners
    with pytest.raises(RuntimeError, match="10 events wait") as caught:
        await reading
    assert caught.value.args[0] == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_caller_that_hangs_up_is_told_nothing_more() -> None:
    pods = Pods()
    service = runtime.RuntimeService(pods, None)  # type: ignore[arg-type]
    reading = asyncio.ensure_future(anext(service.GetContainerEvents(cri.GetEventsRequest(), Context())))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not pods.listeners
