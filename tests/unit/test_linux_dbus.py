"""D-Bus: messages as other implementations write them, bytes from anywhere, and a connection whose far end misbehaves."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nacre.linux import bus, cgroup_names, dbus, systemd_properties
from nacre.linux.cgroup_layout import Hierarchy, Layout
from nacre.linux.dbus import BusBroken, Kind, Message, Variant
from nacre.oci.errors import Failure, Invalid

HELLO = bytes.fromhex(
    "6c01000100000000010000006d000000"  # little-endian, METHOD_CALL, version 1, no body, serial 1, 109 bytes of fields
    "01016f00150000002f6f72672f667265656465736b746f702f4442757300 0000"  # PATH
    "02017300140000006f72672e667265656465736b746f702e4442757300 000000"  # INTERFACE
    "030173000500000048656c6c6f000000"  # MEMBER
    "06017300140000006f72672e667265656465736b746f702e4442757300000000"  # DESTINATION
)
V2 = Layout(hierarchies=(Hierarchy(mount="/sys/fs/cgroup", version=2, controllers=frozenset({"memory"})),))
V1 = Layout(hierarchies=(Hierarchy(mount="/sys/fs/cgroup/memory", version=1, controllers=frozenset({"memory"})),))


def test_a_greeting_is_the_bytes_that_every_client_sends() -> None:
    name = "org.freedesktop.DBus"
    message = Message(
        kind=Kind.METHOD_CALL, serial=1, path="/org/freedesktop/DBus", interface=name, member="Hello", destination=name
    )
    assert dbus.encode(message) == HELLO
    assert dbus.decode(HELLO) == (message, len(HELLO))


def test_a_message_in_the_other_byte_order_is_read() -> None:
    fields = "05017500000000010801670001750000"  # REPLY_SERIAL 1, SIGNATURE "u"
    big = bytes.fromhex("4202000100000004000000070000000f" + fields + "0000002a")
    found = dbus.decode(big)
    assert found is not None and found[0].body == (42,) and found[0].reply_serial == 1


values = st.deferred(
    lambda: st.one_of(
        st.tuples(st.just("y"), st.integers(0, 255)),
        st.tuples(st.just("b"), st.booleans()),
        st.tuples(st.just("n"), st.integers(-(2**15), 2**15 - 1)),
        st.tuples(st.just("u"), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("x"), st.integers(-(2**63), 2**63 - 1)),
        st.tuples(st.just("t"), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("d"), st.floats(allow_nan=False)),
        st.tuples(st.just("s"), st.text().filter(lambda text: "\0" not in text)),
        st.tuples(st.just("ay"), st.binary(max_size=20)),
        st.tuples(st.just("at"), st.lists(st.integers(0, 2**64 - 1), max_size=4)),
        st.tuples(st.just("a{su}"), st.dictionaries(st.sampled_from(["a", "bc", "def"]), st.integers(0, 9))),
        st.lists(values, min_size=1, max_size=3).map(
            lambda many: (f"({''.join(one[0] for one in many)})", tuple(one[1] for one in many))
        ),
        values.map(lambda one: ("v", Variant(*one))),
    )
)


@given(st.lists(values, max_size=5), st.integers(1, 2**32 - 1))
def test_what_is_written_is_read_again(body: list[tuple[str, Any]], serial: int) -> None:
    message = Message(
        kind=Kind.SIGNAL, serial=serial, path="/a/b", interface="c.d", member="E", sender=":1.2",
        signature="".join(one[0] for one in body), body=tuple(one[1] for one in body),
    )  # fmt: skip
    if len(message.signature) > 255:
        return
    data = dbus.encode(message)
    assert dbus.decode(data + b"rest") == (message, len(data))
    assert dbus.decode(data[:-1]) is None


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_are_a_message_or_broken_and_nothing_else(data: bytes) -> None:
    try:
        dbus.decode(data)
    except BusBroken as broken:
        assert broken.cause


@given(st.lists(values, max_size=4), st.data())
def test_a_damaged_message_is_read_or_broken_and_nothing_else(body: list[tuple[str, Any]], data: st.DataObject) -> None:
    signature = "".join(one[0] for one in body)[:255]
    message = Message(
        kind=Kind.SIGNAL,
        serial=1,
        path="/a",
        interface="c.d",
        member="E",
        signature=signature,
        body=tuple(one[1] for one in body),
    )
    try:
        raw = bytearray(dbus.encode(message))
    except (BusBroken, ValueError):
        return  # cut in the middle of a type
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    try:
        dbus.decode(bytes(raw))
    except BusBroken as broken:
        assert broken.cause


@pytest.mark.parametrize(
    "signature", ["a", "(", "(s", "()", "a{sv", "a{(s)v}", "a{vs}", "{sv}", "z", "a" * 40 + "y", "(" * 40 + "y" + ")" * 40]
)
def test_a_malformed_signature_is_broken(signature: str) -> None:
    with pytest.raises(BusBroken):
        dbus.types_of(signature)


def test_variants_nested_without_end_are_broken() -> None:
    value: Any = Variant("y", 1)
    for _ in range(200):
        value = Variant("v", value)
    data = dbus.encode(Message(kind=Kind.SIGNAL, serial=1, path="/a", interface="b.c", member="D", signature="v", body=(value,)))
    with pytest.raises(BusBroken, match="nested too deep"):
        dbus.decode(data)


def test_a_message_that_promises_gigabytes_is_refused_before_they_come() -> None:
    with pytest.raises(BusBroken, match="at most"):
        dbus.decode(HELLO[:4] + b"\xff\xff\xff\x7f" + HELLO[8:])


@given(st.binary(max_size=60))
def test_any_answer_to_the_handshake_is_complete_incomplete_or_a_refusal(answer: bytes) -> None:
    try:
        taken = dbus.admitted(answer)
    except BusBroken:
        return
    assert taken is None or (answer[:taken].startswith(b"DATA") and answer[:taken].endswith(b"\r\n"))


def test_a_bus_that_rejects_us_is_quoted() -> None:
    with pytest.raises(BusBroken, match="REJECTED EXTERNAL"):
        dbus.admitted(b"REJECTED EXTERNAL\r\n")


# -- a connection


@contextmanager
def far_end(directory: Path, serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A listening socket whose one connection is given to `serve` once its handshake is answered."""
    path = str(directory / "bus")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"DATA\r\nOK 0123456789abcdef\r\n")
                serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield path
        finally:
            thread.join(10)
            assert not thread.is_alive()


def answer(connection: socket.socket, *messages: Message) -> Message:
    """Read one call, then send `messages`, their reply_serial being the call's where it is -1."""
    found = dbus.decode(connection.recv(65536))
    assert found is not None
    for one in messages:
        serial = found[0].serial if one.reply_serial == -1 else one.reply_serial
        connection.sendall(
            dbus.encode(Message(**{name: getattr(one, name) for name in one.__slots__} | {"reply_serial": serial}))
        )
    return found[0]


SIGNAL = Message(kind=Kind.SIGNAL, serial=9, path="/o", interface="i.f", member="Happened", signature="s", body=("it",))
RETURN = Message(kind=Kind.METHOD_RETURN, serial=10, reply_serial=-1, signature="u", body=(7,))


def test_a_signal_that_comes_before_the_answer_is_kept_for_who_waits(tmp_path: Path) -> None:
    with (
        far_end(tmp_path, lambda connection: (answer(connection, SIGNAL, RETURN), None)[1]) as path,
        bus.Bus(path, daemon=False) as one,
    ):
        assert one.call("a.b", "/o", "i.f", "Ask") == (7,)
        assert one.await_signal("wait", lambda signal: signal.member == "Happened", 5).body == ("it",)


def test_a_refused_call_has_the_errors_name_and_words(tmp_path: Path) -> None:
    error = Message(kind=Kind.ERROR, serial=3, reply_serial=-1, error_name="x.NoSuchUnit", signature="s", body=("not loaded",))
    with far_end(tmp_path, lambda connection: (answer(connection, error), None)[1]) as path, bus.Bus(path, daemon=False) as one:
        with pytest.raises(bus.CallRefused, match="not loaded") as caught:
            one.call("a.b", "/o", "i.f", "Ask")
        assert caught.value.error == "x.NoSuchUnit"


def test_a_bus_that_hangs_up_is_named(tmp_path: Path) -> None:
    with far_end(tmp_path, lambda connection: None) as path, bus.Bus(path, daemon=False) as one:
        with pytest.raises(BusBroken, match=path):
            one.call("a.b", "/o", "i.f", "Ask")


def test_a_signal_that_never_comes_ends_the_wait_with_its_name(tmp_path: Path) -> None:
    done = threading.Event()
    with far_end(tmp_path, lambda connection: (done.wait(10), None)[1]) as path, bus.Bus(path, daemon=False) as one:
        with pytest.raises(BusBroken, match="start the unit x"):
            one.await_signal("start the unit x", lambda signal: True, 0.05)
        done.set()


def test_no_socket_is_a_failure_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(BusBroken, match="No such file"):
        bus.Bus(str(tmp_path / "none"), daemon=True)


def test_addresses_are_read_as_the_specification_writes_them() -> None:
    assert bus.unix_path("unix:path=/run/a%20b,guid=1;unix:path=/other") == "/run/a b"
    assert bus.unix_path("tcp:host=x;unix:abstract=/y") == "\0/y"
    assert bus.unix_path("") == ""


# -- names


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("", "/nacre-runc-c"),
        ("/a/b", "/a/b"),
        ("a//b/", "/a/b"),
        ("/weird:name:here", "/weird:name:here"),
        ("system.slice:engine:c", "/system.slice/engine-c.scope"),
        (":engine:c", "/system.slice/engine-c.scope"),
        ("a-b-c.slice::c", "/a.slice/a-b.slice/a-b-c.slice/c.scope"),
        ("user:engine:c.scope", "/user.slice/engine-c.scope"),
        ("-.slice:engine:c", "/engine-c.scope"),
        ("a.slice::a-b.slice", "/a.slice/a-b.slice"),
    ],
)
def test_either_form_of_a_cgroups_path_leads_somewhere_without_systemd(wanted: str, path: str) -> None:
    assert cgroup_names.resolve(wanted, "c", systemd=False) == cgroup_names.Place(path=path)


@pytest.mark.parametrize("wanted", ["a:b", "a:b:c:d", "a:b:", "a/b:c:d", "a--b.slice:p:n", "-a.slice:p:n", "a:b:../x", "a/../b"])
def test_a_cgroups_path_of_no_form_is_refused_with_the_two_forms(wanted: str) -> None:
    with pytest.raises(Invalid):
        cgroup_names.resolve(wanted, "c", systemd=False)


@given(st.text(max_size=30))
def test_any_cgroups_path_is_absolute_and_beneath_the_root_or_refused(wanted: str) -> None:
    try:
        place = cgroup_names.resolve(wanted, "c", systemd=False)
    except Invalid:
        return
    assert place.path.startswith("/") and ".." not in place.path.split("/")


def test_systemd_asked_for_where_it_is_not_the_init_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cgroup_names, "SYSTEMD", str(tmp_path / "system"))
    with pytest.raises(Failure, match="not this machine's init") as caught:
        cgroup_names.resolve("system.slice:p:n", "c", systemd=True)
    assert "cgroup_driver" in caught.value.remedy
    os.mkdir(tmp_path / "system")
    place = cgroup_names.resolve("system.slice:p:n", "c", systemd=True)
    assert place == cgroup_names.Place(path="/system.slice/p-n.scope", unit="p-n.scope", slice="system.slice")
    assert cgroup_names.resolve("/a/b", "c", systemd=True) == cgroup_names.Place(path="/a/b")
    assert cgroup_names.resolve("", "c", systemd=True).unit == "nacre-runc-c.scope"


# -- properties


def plain(resources: dict[str, Any], layout: Layout = V2) -> dict[str, Any]:
    return {name: variant.value for name, variant in systemd_properties.properties_of(resources, layout)}


def test_a_number_of_tasks_is_bounded_or_not() -> None:
    assert [plain({"pids": {"limit": limit}})["TasksMax"] for limit in (-1, 0, 1, 7)] == [2**64 - 1, 1, 1, 7]


def test_limits_become_the_properties_that_engines_agree_on() -> None:
    resources = {
        "memory": {"limit": 64 << 20, "swap": 96 << 20, "reservation": 1 << 20},
        "cpu": {"shares": 1024, "quota": 150_000, "period": 100_000, "cpus": "0-2,5", "mems": "0"},
        "pids": {"limit": 20},
        "blockIO": {"weight": 500},
        "unified": {"memory.high": "1000", "pids.max": "max", "cpu.max": "50000 100000"},
    }
    assert plain(resources) == {
        "MemoryMax": 64 << 20, "MemorySwapMax": 32 << 20, "MemoryLow": 1 << 20, "CPUWeight": 39, "CPUQuotaPerSecUSec": 500_000,
        "CPUQuotaPeriodUSec": 100_000, "AllowedCPUs": b"\x27", "AllowedMemoryNodes": b"\1", "TasksMax": 2**64 - 1, "IOWeight": 4950,
        "MemoryHigh": 1000,
    }  # fmt: skip
    assert plain(resources, V1) == {
        "MemoryLimit": 64 << 20, "CPUShares": 1024, "CPUQuotaPerSecUSec": 1_500_000, "CPUQuotaPeriodUSec": 100_000, "TasksMax": 20,
        "BlockIOWeight": 500,
    }  # fmt: skip


def test_a_quota_that_is_no_whole_percent_is_rounded_up_never_down() -> None:
    assert plain({"cpu": {"quota": 1001, "period": 100_000}})["CPUQuotaPerSecUSec"] == 20_000
    assert plain({"cpu": {"quota": -1}})["CPUQuotaPerSecUSec"] == 2**64 - 1


@given(st.text(max_size=12))
@example("²")
def test_any_list_of_cpus_is_a_mask_or_left_to_the_kernel(text: str) -> None:
    assert isinstance(systemd_properties._mask(text), bytes)


@given(st.text(max_size=12))
@example("² ²")
def test_any_unified_value_is_a_property_or_left_to_the_file(text: str) -> None:
    assert plain({"unified": dict.fromkeys(("pids.max", "cpu.max", "memory.high"), text)}).keys() <= {
        "TasksMax", "CPUQuotaPerSecUSec", "CPUQuotaPeriodUSec", "MemoryHigh"
    }  # fmt: skip


def test_a_device_list_becomes_a_strict_policy_and_one_that_allows_all_does_not() -> None:
    deny = {"allow": False, "access": "rwm"}
    listed = systemd_properties.properties_of(
        {"devices": [deny, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}]}, V2
    )
    assert listed[0] == ("DevicePolicy", Variant("s", "strict")) and listed[1] == ("DeviceAllow", Variant("a(ss)", []))
    entries = listed[2][1].value
    assert ("/dev/char/10:229", "rw") in entries and ("char-*", "m") in entries and ("/dev/char/1:3", "rwm") in entries
    assert ("char-pts", "rwm") in entries
    assert plain({"devices": [deny, {"allow": True, "access": "rwm"}]}) == {"DevicePolicy": "auto", "DeviceAllow": []}
