"""The netlink codec: bytes as the kernel takes them, and bytes from anywhere."""

from __future__ import annotations

import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.linux import netlink, nftables, rtnetlink
from nacre.linux.netlink import TEXT, U32, Flag, ListOf, Malformed, Request, Table

LAYOUTS = [rtnetlink.LINK_READ, rtnetlink.LINK_ADDRESS, rtnetlink.ROUTE, *nftables._LAYOUTS.values()]


def test_a_new_link_is_the_bytes_that_ip_link_add_sends() -> None:
    request = rtnetlink.new_link("br9", "bridge")
    wanted = (
        "38000000 1000 0506 07000000 00000000"  # length 56, RTM_NEWLINK, REQUEST|ACK|EXCL|CREATE, sequence, port
        "00000000 00000000 00000000 00000000"  # ifinfomsg
        "0800 0300 62723900"  # IFLA_IFNAME
        "1000 1280 0b00 0100 62726964676500 00"  # IFLA_LINKINFO{IFLA_INFO_KIND}
    )
    assert netlink.pack(request, 7, acknowledge=True) == bytes.fromhex(wanted)


def test_a_refusal_keeps_the_kernels_words() -> None:
    quoted = struct.pack("=IHHII", 32, 16, 5, 9, 0)
    words = netlink.attribute(1, b"Unknown device type\0") + netlink.attribute(2, struct.pack("=I", 40))
    body = struct.pack("=i", -95) + quoted + words
    message = netlink.Message(2, netlink.CAPPED | netlink.ACK_TLVS, 9, 0, body)
    assert netlink.acknowledgement(message) == (95, "Unknown device type, at byte 40 of the request")


def test_a_refusal_survives_a_pipe() -> None:
    error = netlink.NetlinkError("RTM_NEWLINK", 17, "nacre0", "words")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "RTM_NEWLINK nacre0: File exists (errno 17): words"


def test_unknown_attributes_stay_as_bytes() -> None:
    table = Table({"name": (3, TEXT)})
    data = netlink.attribute(3, b"lo\0") + netlink.attribute(99, b"\1\2\3")
    assert table.decode(data) == {"name": "lo", "#99": b"\1\2\3"}


@given(st.dictionaries(st.sampled_from(["name", "mtu", "alias"]), st.none()), st.integers(0, 2**32 - 1), st.text(max_size=20))
def test_what_is_encoded_is_decoded_again(keys: dict[str, None], number: int, text: str) -> None:
    plain = text.replace("\0", "")
    values = {"name": plain, "mtu": number, "alias": plain}
    chosen = {key: values[key] for key in keys}
    body = rtnetlink.LINK.encode({"index": 3, "family": 1}, chosen)
    decoded = rtnetlink.LINK_READ.decode(body)
    assert {key: decoded[key] for key in chosen} == chosen
    assert (decoded["index"], decoded["family"]) == (3, 1)


@given(st.binary(max_size=300))
def test_foreign_bytes_decode_or_are_malformed(data: bytes) -> None:
    for decode in (lambda: list(netlink.unpack(data)), *(lambda layout=layout: layout.decode(data) for layout in LAYOUTS)):
        try:
            decode()
        except Malformed:
            continue


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=60)), max_size=12))
def test_foreign_attributes_of_right_length_decode_or_are_malformed(parts: list[tuple[int, bytes]]) -> None:
    data = b"".join(netlink.attribute(number % 60, value) for number, value in parts)
    for layout in LAYOUTS:
        try:
            layout.decode(bytes(layout._struct.size + -layout._struct.size % 4) + data)
        except Malformed:
            continue


@given(st.binary(max_size=80), st.sampled_from([0, netlink.ACK_TLVS, netlink.ACK_TLVS | netlink.CAPPED]), st.sampled_from([2, 3]))
def test_foreign_acknowledgements_decode_or_are_malformed(body: bytes, flags: int, kind: int) -> None:
    try:
        code, words = netlink.acknowledgement(netlink.Message(kind, flags, 1, 0, body))
    except Malformed:
        return
    assert isinstance(code, int) and isinstance(words, str)


def test_attributes_nested_without_end_are_malformed() -> None:
    table = Table({})
    table.by_name["inner"] = (1, table)
    table.by_number[1] = ("inner", table)
    data = b""
    for _ in range(50):
        data = netlink.attribute(1, data)
    with pytest.raises(Malformed, match="nested"):
        table.decode(data)


def test_lists_keep_their_order() -> None:
    table = Table({"numbers": (4, ListOf(U32))})
    assert table.decode(table.encode({"numbers": [3, 1, 2]})) == {"numbers": [3, 1, 2]}


def test_an_attribute_too_long_for_its_length_field_is_refused() -> None:
    with pytest.raises(Malformed, match="65535"):
        netlink.attribute(1, bytes(70000))


def test_a_request_names_its_object() -> None:
    request = rtnetlink.address(3, "10.1.2.3/24")
    assert (request.call, request.target) == ("RTM_NEWADDR", "10.1.2.3/24")
    assert isinstance(request, Request) and request.flags & Flag.EXCL
