"""The control socket: what a command asks and what a daemon answers."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nacre import config
from nacre.cli import control
from nacre.oci.errors import Failure, NotFound


def with_daemon(settings: config.Config, operations: dict[str, control.Operation], work: Callable[[], Any]) -> Any:
    """`work` in a thread while a control server of `operations` runs in a loop here."""
    os.makedirs(settings.state, exist_ok=True)

    async def run() -> Any:
        server = await control.serve(settings, operations)
        try:
            return await asyncio.to_thread(work)
        finally:
            server.close()

    return asyncio.run(run())


def test_a_request_gets_progress_and_then_its_result(prefix: Path) -> None:
    settings, seen = config.load(str(prefix)), []

    async def count(request: dict[str, Any], progress: control.Progress) -> dict[str, Any]:
        for number in range(int(request["to"])):
            progress(f"{number}")
        return {"counted": request["to"]}

    answer = with_daemon(settings, {"count": count}, lambda: control.ask(settings, "count", progress=seen.append, to=3))
    assert answer == {"counted": 3}
    assert seen == ["0", "1", "2"]


def test_a_failure_crosses_the_socket_whole(prefix: Path) -> None:
    settings = config.load(str(prefix))

    async def fail(_request: dict[str, Any], _progress: control.Progress) -> dict[str, Any]:
        raise NotFound(what="find it", cause="it is not there", evidence=("looked twice",), remedy="look again")

    with pytest.raises(NotFound) as caught:
        with_daemon(settings, {"find": fail}, lambda: control.ask(settings, "find"))
    assert caught.value.evidence == ("looked twice",)
    assert caught.value.remedy == "look again"


def test_an_unknown_operation_names_the_known_ones(prefix: Path) -> None:
    settings = config.load(str(prefix))
    with pytest.raises(Failure, match="known are"):
        with_daemon(settings, {}, lambda: control.ask(settings, "fly"))


def test_the_socket_is_for_root_alone_and_replaces_a_dead_one(prefix: Path) -> None:
    settings = config.load(str(prefix))
    os.makedirs(settings.state)
    Path(control.path(settings)).write_text("")
    mode = with_daemon(settings, {}, lambda: stat.S_IMODE(os.stat(control.path(settings)).st_mode))
    assert mode == 0o600


def test_a_prefix_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    settings = config.load(str(tmp_path / ("deep" * 30)))

    async def answer(_request: dict[str, Any], _progress: control.Progress) -> dict[str, Any]:
        return {"thread": threading.current_thread().name}

    assert with_daemon(settings, {"status": answer}, lambda: control.ask(settings, "status"))["thread"] == "MainThread"
