"""The daemon's side of a shim's socket, with the shim's end held by the test."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nacre.cri import shims
from nacre.cri.pods import busy_with
from nacre.cri.shims import Connection, ShimDied, ShimSlow
from nacre.oci.errors import Invalid, NotFound, encode
from nacre.shim import messages


@asynccontextmanager
async def connected(**fields: object) -> AsyncIterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Connection(ours, "the shim of a test", lambda _event: None, lambda: None, **fields)  # type: ignore[arg-type]  # fields of Connection
    try:
        yield made, theirs
    finally:
        made.close()
        theirs.close()


async def test_a_shim_that_does_not_answer_is_named_with_the_act_and_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shims, "DEADLINE_S", 0.1)
    async with connected(evidence=lambda: ("pid 1 (nacre-shim) is in state D, waits in nfs",)) as (made, _theirs):
        with pytest.raises(ShimSlow) as caught:
            await made.ask("kill", container="c")
    assert str(caught.value) == "ask the shim of a test to kill: it has not answered for 0 s"
    assert caught.value.evidence == ("pid 1 (nacre-shim) is in state D, waits in nfs",)


async def test_where_more_patience_is_set_an_answer_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shims, "DEADLINE_S", 0.1)
    async with connected() as (made, theirs):
        made.patience = 300
        asking = asyncio.create_task(made.ask("kill", container="c"))
        asked = await asyncio.to_thread(theirs.recv, 65536)
        done, _waiting = await asyncio.wait({asking}, timeout=0.3)
        assert not done, "its time is not over"
        theirs.send(json.dumps({"id": json.loads(asked)["id"], "result": {}}).encode())
        assert await asking == ({}, [])


async def test_our_deadlines_end_before_a_kubelets() -> None:
    assert shims.DEADLINE_S < 120 and shims.DEADLINES_S["create_sandbox"] < 240


async def test_a_failure_comes_through_whole_and_descriptors_with_an_answer() -> None:
    async with connected() as (made, theirs):
        asked = asyncio.ensure_future(made.ask("attach"))
        await asyncio.sleep(0)
        request, _none = messages.receive(theirs)
        assert request is not None and request["op"] == "attach"
        messages.send(theirs, {"id": request["id"], "failure": encode(NotFound(what="a", cause="b", remedy="c"))})
        with pytest.raises(NotFound, match="a: b"):
            await asked
        asked = asyncio.ensure_future(made.ask("execute"))
        await asyncio.sleep(0)
        read, write = os.pipe()
        messages.send(theirs, {"id": request["id"] + 1, "result": {"n": 1}}, [write])
        answer, (received,) = await asked
        os.close(write)
        os.write(received, b"x")
        assert (answer, os.read(read, 1)) == ({"n": 1}, b"x")
        for fd in (read, received):
            os.close(fd)


async def test_who_waits_for_a_shim_that_dies_is_told_at_once() -> None:
    async with connected() as (made, theirs):
        asked = [asyncio.ensure_future(made.ask("stats")) for _ in range(3)]
        await asyncio.sleep(0)
        theirs.close()
        for one in asked:
            with pytest.raises(ShimDied):
                await one
        with pytest.raises(ShimDied):
            await made.ask("stats")


async def test_more_requests_than_the_socket_holds_wait_for_room() -> None:
    async with connected() as (made, theirs):
        asked = [asyncio.ensure_future(made.ask("execute", process="x" * 50_000)) for _ in range(40)]
        for _ in range(40):
            while True:
                await asyncio.sleep(0)
                theirs.setblocking(False)
                try:
                    request, _none = messages.receive(theirs)
                    break
                except BlockingIOError:
                    continue
            assert request is not None
            messages.send(theirs, {"id": request["id"], "result": {}})
        await asyncio.gather(*asked)


async def test_a_request_that_is_too_long_is_refused_before_it_is_sent() -> None:
    async with connected() as (made, _theirs):
        with pytest.raises(Invalid, match="over the limit"):
            await made.ask("execute", process="x" * 200_000)


def test_what_a_shim_is_busy_with_names_it_and_its_children(tmp_path: Path) -> None:
    (tmp_path / "shim.json").write_text(f'{{"pid": {os.getpid()}}}')
    assert busy_with(str(tmp_path))[0].startswith(f"pid {os.getpid()} (")
    assert "cannot be looked at" in busy_with(str(tmp_path / "none"))[0]
