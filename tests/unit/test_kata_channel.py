"""The host's end of the agent channel, against a far end that keeps to the protocol and one that does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.agent import frames, protocol
from nacre.agent.frames import BrokenChannel
from nacre.kata.channel import Agent, AgentGone, AgentSilent
from nacre.kata.waiting import Nobody, Watches
from nacre.oci.errors import Failure


class Guest:
    """The wire's far end: answers requests by `answers`, method → result, from inside the host's own waits."""

    def __init__(self, sock: socket.socket, watches: Watches) -> None:
        self.sock, self.channel = sock, frames.Channel()
        self.answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.got: list[frames.Event] = []
        sock.setblocking(False)
        watches.watch(sock.fileno(), self.readable)

    def readable(self) -> None:
        for event in self.channel.receive(self.sock.recv(1 << 20)):
            self.got.append(event)
            if isinstance(event, frames.Message):
                answer = self.answers.get(event.document["method"])
                if answer is not None:
                    self.channel.message({"id": event.document["id"], **answer(event.document["params"])})
        self.flush()

    def flush(self) -> None:
        self.channel.written(self.sock.send(bytes(self.channel.outgoing)))


@pytest.fixture
def pair() -> Iterator[tuple[Agent, Guest, list[Any]]]:
    ours, theirs = socket.socketpair()
    watches, events = Watches(Nobody()), []
    agent = Agent(ours, watches, events.append)
    yield agent, Guest(theirs, watches), events
    agent.close()
    theirs.close()


def test_a_result_comes_back_as_its_record_and_a_failure_as_itself(pair: Any) -> None:
    agent, guest, _events = pair
    guest.answers["start"] = lambda params: (
        {"result": {"pid": 7}}
        if params["container"] == "a"
        else {"failure": {"code": "NotFound", "what": "start it", "cause": "gone", "evidence": [], "remedy": ""}}
    )
    assert agent.call(protocol.Start(container="a")) == protocol.Started(pid=7)
    with pytest.raises(Failure, match="start it: gone") as refused:
        agent.call(protocol.Start(container="b"))
    assert refused.value.code == "NotFound"


def test_answers_may_come_in_any_order(pair: Any) -> None:
    agent, guest, _events = pair
    one, other = agent.ask(protocol.Start(container="a")), agent.ask(protocol.Start(container="b"))
    for number, pid in ((other[0], 2), (one[0], 1)):
        guest.channel.message({"id": number, "result": {"pid": pid}})
    guest.flush()
    assert (agent.answer(one, 5).pid, agent.answer(other, 5).pid) == (1, 2)


def test_a_silent_guest_is_named_with_the_method_and_the_time(pair: Any) -> None:
    agent, _guest, _events = pair
    with pytest.raises(AgentSilent, match=r"delete in the guest: its agent did not answer within"):
        agent.call(protocol.Delete(container="a"), 0.05)


def test_a_greeting_with_another_nonce_is_not_believed(pair: Any) -> None:
    agent, guest, _events = pair
    greeting = {"version": 1, "nonce": "stale", "nacre": "1", "kernel": "6", "memory_bytes": 1, "cpus": 1}
    guest.answers["hello"] = lambda _params: {"result": greeting}
    with pytest.raises(BrokenChannel, match="answered somebody else"):
        agent.begin(5)


def test_a_result_of_the_wrong_shape_is_refused(pair: Any) -> None:
    agent, guest, _events = pair
    guest.answers["start"] = lambda _params: {"result": {"pid": "7"}}
    with pytest.raises(Failure, match=r"start\.pid is no int"):
        agent.call(protocol.Start(container="a"))


def test_a_closed_channel_ends_waits_and_closes_the_pipes(pair: Any) -> None:
    agent, guest, _events = pair
    read, write = os.pipe()
    agent.outlet(write)
    guest.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(AgentGone):
        agent.call(protocol.Start(container="a"), 5)
    assert os.read(read, 1) == b"", "who reads the pipe sees its end"
    os.close(read)


def test_a_pipe_that_is_full_holds_the_guest_back_and_loses_nothing(pair: Any) -> None:
    agent, guest, _events = pair
    read, write = os.pipe()
    stream = agent.outlet(write)
    guest.channel.open(stream, sends=True, receives=False)
    sent = os.urandom(400_000)
    left, got = memoryview(sent), b""
    while len(got) < len(sent):
        left = left[guest.channel.send(stream, left) :]
        guest.flush()
        agent.watches.wait(lambda: False, 0.01)
        assert len(sent) - len(left) - len(got) <= frames.WINDOW + (1 << 17), "no more is on its way than window and pipe hold"
        got += os.read(read, 50_000)
    assert got == sent
    os.close(read)


def test_input_is_read_only_after_the_guest_has_opened_the_stream(pair: Any) -> None:
    agent, guest, _events = pair
    read, write = os.pipe()
    os.write(write, b"typed")
    os.close(write)
    stream = agent.inlet(read)
    agent.watches.wait(lambda: False, 0.02)
    assert guest.got == []
    guest.channel.open(stream, sends=False, receives=True)
    agent.go(stream)
    assert agent.watches.wait(lambda: len(guest.got) == 2, 5)
    assert guest.got == [frames.Data(stream, b"typed"), frames.Ended(stream)]


@given(st.binary(min_size=1, max_size=200))
def test_a_hostile_guest_breaks_its_own_channel_at_most(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    watches = Watches(Nobody())
    agent = Agent(ours, watches, lambda _event: None)
    try:
        theirs.sendall(data)
        theirs.close()
        with pytest.raises(Failure):
            agent.call(protocol.Start(container="a"), 5)
        assert agent.broken is not None
    finally:
        agent.close()
