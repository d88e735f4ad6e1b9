"""QMP: the codec against any bytes, the client against a far end that answers as QEMU does and as it must not."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.kata.qmp import LINE_LIMIT, Codec, Qmp, QmpBroken, QmpRefused, QmpSilent

MESSAGES = st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=20), st.none()), max_size=4)


@given(st.lists(MESSAGES, max_size=6), st.data())
def test_messages_come_out_whole_however_the_bytes_are_cut(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    wire = b"".join(json.dumps(one).encode() + b"\r\n" for one in messages)
    codec, got = Codec(), []
    while wire:
        cut = data.draw(st.integers(1, len(wire)))
        got += codec.feed(wire[:cut])
        wire = wire[cut:]
    assert got == messages


@given(st.binary(max_size=300))
def test_any_bytes_are_messages_or_a_value_error(data: bytes) -> None:
    try:
        assert all(isinstance(one, dict) for one in Codec().feed(data))
    except ValueError:
        pass


def test_an_endless_line_is_refused_before_it_fills_memory() -> None:
    codec = Codec()
    with pytest.raises(ValueError, match="longer than"):
        for _ in range(LINE_LIMIT // 4096 + 2):
            codec.feed(b"x" * 4096)


def test_deep_nesting_is_refused_not_crashed_on() -> None:
    with pytest.raises(ValueError):
        Codec().feed(b"[" * 200_000 + b"\n")


@pytest.fixture
def ends() -> Any:
    ours, theirs = socket.socketpair()
    events: list[tuple[str, dict[str, Any]]] = []
    qmp = Qmp(ours, lambda name, data: events.append((name, data)))
    yield qmp, theirs, events
    qmp.close()
    theirs.close()


def test_an_answer_is_found_among_events_and_the_greeting(ends: Any) -> None:
    qmp, theirs, events = ends
    asked = qmp.send("query-status", {})
    theirs.sendall(
        b'{"QMP": {}}\n{"event": "STOP", "data": {"a": 1}}\n{"return": 5, "id": 99}\n{"return": {"ok": true}, "id": 1}\n'
    )
    assert qmp.answer(asked) == {"ok": True}
    assert events == [("STOP", {"a": 1})]
    assert json.loads(theirs.recv(4096)) == {"execute": "query-status", "id": 1}


def test_a_refusal_carries_qemus_words(ends: Any) -> None:
    qmp, theirs, _events = ends
    asked = qmp.send("device_add", {"driver": "x"})
    theirs.sendall(b'{"error": {"class": "GenericError", "desc": "no such device"}, "id": 1}\n')
    with pytest.raises(QmpRefused, match="no such device"):
        qmp.answer(asked)


def test_a_qemu_that_lives_and_says_nothing_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nacre.kata.qmp.DEADLINE_S", 0.01)
    ours, theirs = socket.socketpair()
    with theirs:
        qmp = Qmp(ours, lambda _name, _data: None, patience=3)
        with pytest.raises(QmpSilent) as caught:
            qmp.execute("qmp_capabilities")
        qmp.close()
    assert caught.value.cause == "no answer within 0.03 s" and "patience" in caught.value.remedy


def test_a_closed_socket_and_foreign_bytes_end_the_conversation(ends: Any) -> None:
    qmp, theirs, _events = ends
    asked = qmp.send("stop", {})
    theirs.sendall(b"\x00\xff not qmp\n")
    with pytest.raises(QmpBroken, match="no JSON"):
        qmp.answer(asked)
    assert qmp.closed


def test_descriptors_travel_with_their_command(ends: Any) -> None:
    qmp, theirs, _events = ends
    read, write = os.pipe()
    answers = threading.Thread(target=lambda: theirs.sendall(b'{"return": {}, "id": 1}\n'))
    answers.start()
    qmp.execute("getfd", {"fdname": "a"}, (write,))
    answers.join()
    _data, (received,), _flags, _address = socket.recv_fds(theirs, 4096, 1)
    os.write(received, b"same")
    assert os.read(read, 4) == b"same"
    for fd in (read, write, received):
        os.close(fd)
