"""What a long runtime call is busy with, told while it lasts. The CRI has no word for progress: a verbose Status' info has ours.

A runtime that says nothing there is asked all the same, once in LOOK_S of such a call; calls that are quick are never asked about.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc

from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import PROGRESS, Stub

LOOK_S = 1.0
T = TypeVar("T")


class Interrupted(Exception):
    """The pod is to end: what was being made is not wanted any more."""


async def told(
    runtime: Stub,
    subject: str,
    work: Coroutine[Any, Any, T],
    say: Callable[[str], None],
    unwanted: Callable[[], bool] = lambda: False,
) -> T:
    """What `work` answers or raises; meanwhile `say` gets what the runtime says about `subject`, each news once.

    Raises Interrupted when `unwanted` and the runtime is still at its preparations: it has begun nothing that must be finished.
    """
    task, last = asyncio.ensure_future(work), ""
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            words = await _doing(runtime, subject)
            if words and unwanted():
                raise Interrupted
            if words not in ("", last):
                last = words
                say(words)
        return task.result()
    finally:
        task.cancel()


async def _doing(runtime: Stub, subject: str) -> str:
    try:
        answer = await runtime.Status(cri.StatusRequest(verbose=True))
        return str(json.loads(answer.info.get(PROGRESS, "{}")).get(subject, ""))
    except (grpc.RpcError, ValueError, AttributeError):
        return ""  # the call itself will tell what is wrong with the runtime; foreign ones use the key as they like
