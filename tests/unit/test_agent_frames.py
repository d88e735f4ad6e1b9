"""The agent's wire, both ends in one process: what one sends the other gets, and nothing that a hostile end says is believed."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre.agent.frames import (
    CONTROL_LIMIT,
    DATA_LIMIT,
    STREAMS,
    WINDOW,
    BrokenChannel,
    Channel,
    Data,
    Ended,
    Event,
    Kind,
    Message,
    Stopped,
    Writable,
)
from nacre.oci.errors import Invalid

documents = st.dictionaries(
    st.text(max_size=8), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=8), max_size=5
)


def frame(stream: int, kind: int, payload: bytes = b"", *, length: int | None = None, zero: bytes = b"\0\0\0") -> bytes:
    return struct.pack("!IIB3s", len(payload) if length is None else length, stream, kind, zero) + payload


def pair() -> tuple[Channel, Channel, int]:
    """Two ends with one stream open both ways."""
    host, guest = Channel(), Channel()
    for end in (host, guest):
        end.open(1, sends=True, receives=True)
    return host, guest, 1


def carry(source: Channel, target: Channel) -> list[Event]:
    data = bytes(source.outgoing)
    source.written(len(data))
    return target.receive(data)


@given(st.lists(documents, max_size=6), st.integers(1, 40))
def test_messages_arrive_whole_however_the_bytes_are_cut(sent: list[dict[str, Any]], piece: int) -> None:
    host, guest = Channel(), Channel()
    for document in sent:
        host.message(document)
    data, events = bytes(host.outgoing), []
    for start in range(0, len(data), piece):
        events += guest.receive(data[start : start + piece])
    assert events == [Message(document) for document in sent]


def test_data_stops_at_the_window_and_goes_on_with_credit() -> None:
    host, guest, stream = pair()
    assert host.send(stream, bytes(WINDOW + 5)) == WINDOW
    assert host.send(stream, b"more") == 0
    events = carry(host, guest)
    assert sum(len(event.data) for event in events if isinstance(event, Data)) == WINDOW
    assert all(len(event.data) <= DATA_LIMIT for event in events if isinstance(event, Data))
    guest.consumed(stream, 4)
    assert carry(guest, host) == [Writable(stream)]
    assert host.room(stream) == 4


def test_a_stream_is_gone_when_both_have_ended_it_and_its_number_is_used_up() -> None:
    host, guest, stream = pair()
    host.end(stream)
    assert carry(host, guest) == [Ended(stream)]
    assert host.is_open(stream)
    guest.end(stream)
    assert carry(guest, host) == [Ended(stream)]
    assert not host.is_open(stream)
    assert not guest.is_open(stream)
    with pytest.raises(BrokenChannel):
        host.open(stream, sends=True, receives=True)


def test_what_is_under_way_after_a_stop_is_dropped_until_the_end() -> None:
    host, guest, stream = pair()
    guest.send(stream, b"late")
    host.stop(stream)
    assert carry(guest, host) == []
    assert carry(host, guest) == [Stopped(stream)]
    assert guest.send(stream, b"never") == 0
    assert carry(guest, host) == [Ended(stream)]


def test_credit_that_crosses_an_end_is_no_error() -> None:
    host, guest, stream = pair()
    host.send(stream, b"x")
    host.end(stream)
    guest.end(stream)
    carry(host, guest)
    guest.outgoing += frame(stream, Kind.CREDIT, struct.pack("!I", 1))
    assert carry(guest, host) == [Ended(stream)]


def test_a_new_session_begins_with_the_first_number_again() -> None:
    host, _, _ = pair()
    assert host.next_stream() == 2
    host.reset()
    assert host.next_stream() == 1
    assert host.room(1) == 0


def test_a_message_over_the_limit_is_not_sent() -> None:
    host = Channel()
    with pytest.raises(Invalid, match="limit"):
        host.message({"x": "y" * CONTROL_LIMIT})
    assert not host.outgoing


HOSTILE = {
    "a header with garbage at its end": frame(0, 0, b"{}", zero=b"\0\0\1"),
    "a control frame of another kind": frame(0, Kind.END),
    "a control frame over the limit": frame(0, 0, length=CONTROL_LIMIT + 1),
    "an empty control frame": frame(0, 0, b""),
    "a control frame that is no JSON": frame(0, 0, b"{x}"),
    "a control frame that is no object": frame(0, 0, b"[1]"),
    "JSON nested without end": frame(0, 0, b'{"a":' * 100000 + b"1" + b"}" * 100000),
    "JSON nested more than is allowed": frame(0, 0, b'{"a":' * 70 + b"1" + b"}" * 70),
    "JSON that is not UTF-8": frame(0, 0, b'{"a":"\xff"}'),
    "data of a stream that nobody opened": frame(2, Kind.DATA, b"x"),
    "data of the highest stream": frame(0xFFFFFFFF, Kind.DATA, b"x"),
    "data over the limit": frame(1, Kind.DATA, length=DATA_LIMIT + 1),
    "no data": frame(1, Kind.DATA),
    "an unknown kind": frame(1, 9),
    "an end with a payload": frame(1, Kind.END, b"x"),
    "credit that was never used": frame(1, Kind.CREDIT, struct.pack("!I", 1)),
    "credit of nothing": frame(1, Kind.CREDIT, struct.pack("!I", 0)),
    "credit beyond the window": frame(1, Kind.CREDIT, struct.pack("!I", 0xFFFFFFFF)),
    "credit of three bytes": frame(1, Kind.CREDIT, b"\0\0\1"),
    "two ends": frame(1, Kind.END) * 2,
    "data after the end": frame(1, Kind.END) + frame(1, Kind.DATA, b"x"),
    "data beyond the window": frame(1, Kind.DATA, bytes(DATA_LIMIT)) * (WINDOW // DATA_LIMIT) + frame(1, Kind.DATA, b"x"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_end_is_found_out_and_heard_no_more(data: bytes) -> None:
    host, _, _ = pair()
    with pytest.raises(BrokenChannel):
        host.receive(data)
    with pytest.raises(BrokenChannel, match="broken before"):
        host.receive(frame(0, 0, b"{}"))


def test_an_announced_length_is_judged_before_anything_is_kept_for_it() -> None:
    with pytest.raises(BrokenChannel):
        Channel().receive(struct.pack("!IIB3s", 0xFFFFFFFF, 0, 0, b"\0\0\0"))


def test_streams_have_an_upper_limit() -> None:
    host = Channel()
    for stream in range(1, STREAMS + 1):
        host.open(stream, sends=True, receives=False)
    with pytest.raises(BrokenChannel):
        host.open(STREAMS + 1, sends=True, receives=False)


@given(st.binary(max_size=300) | st.builds(frame, st.integers(0, 3), st.integers(0, 5), st.binary(max_size=40)))
@settings(max_examples=300)
def test_whatever_comes_gives_events_or_a_broken_channel(data: bytes) -> None:
    host, _, stream = pair()
    host.send(stream, b"ab")
    try:
        events = host.receive(data * 2)
    except BrokenChannel:
        return
    assert all(isinstance(event, Message | Data | Ended | Writable | Stopped) for event in events)
    assert host.room(stream) <= WINDOW


acts = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["send", "end", "stop", "carry"]), st.integers(1, 70000)), max_size=40
)


@given(acts)
def test_two_honest_ends_never_break_each_other_and_lose_nothing(script: list[tuple[int, str, int]]) -> None:
    host, guest, stream = pair()
    ends = (host, guest)
    sent, got, stopped = [0, 0], [0, 0], [False, False]
    for side, act, size in [*script, (0, "carry", 0), (1, "carry", 0), (0, "carry", 0), (1, "carry", 0)]:
        me, other = ends[side], ends[1 - side]
        if act == "send":
            sent[side] += me.send(stream, bytes(size))
        elif act == "end":
            me.end(stream)
        elif act == "stop":
            me.stop(stream)
            stopped[side] = True
        else:
            for event in carry(me, other):
                if isinstance(event, Data):
                    got[side] += len(event.data)
                    other.consumed(stream, len(event.data))
    for side in (0, 1):
        assert got[side] == sent[side] or stopped[1 - side]
        assert got[side] <= sent[side]


def test_a_frame_is_twelve_bytes_and_its_payload() -> None:
    host = Channel()
    host.message({"id": 1})
    assert bytes(host.outgoing) == b"\0\0\0\x08\0\0\0\0\0\0\0\0" + json.dumps({"id": 1}, separators=(",", ":")).encode()
