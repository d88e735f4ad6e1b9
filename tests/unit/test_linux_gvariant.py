"""Values of systemd's properties as annotations write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.linux.dbus import Variant
from nacre.linux.gvariant import parse
from nacre.linux.systemd_properties import properties_in
from nacre.oci.errors import Invalid


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", Variant("b", True)),
        (" false ", Variant("b", False)),
        ("15", Variant("i", 15)),
        ("uint64 30000000", Variant("t", 30_000_000)),
        ("byte 7", Variant("y", 7)),
        ("int64 -1", Variant("x", -1)),
        ("'inactive-or-failed'", Variant("s", "inactive-or-failed")),
        ('"it\'s"', Variant("s", "it's")),
        (r"'a\'b\n'", Variant("s", "a'b\n")),
        ("['a.service', \"b.service\"]", Variant("as", ["a.service", "b.service"])),
        ("[]", Variant("as", [])),
    ],
)
def test_each_form_is_the_value_that_it_writes(text: str, value: Variant) -> None:
    assert parse(text, "x") == value


@pytest.mark.parametrize(
    "text",
    ["", "word", "'open", "uint64 -1", "uint128 1", "4294967296", "byte 256", "[1]", "['a' 'b']", "['a',,'b']", "[", "'a' b"],
)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        parse(text, "x")


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    try:
        assert parse(text, "x").signature
    except Invalid as failure:
        assert failure.cause


@given(st.text(max_size=20))
def test_a_quoted_text_comes_back(text: str) -> None:
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    assert parse(f"'{quoted}'", "x") == Variant("s", text)


def test_annotations_name_properties_and_seconds_become_microseconds() -> None:
    prefix = "org.systemd.property."
    found = properties_in({f"{prefix}KillSignal": "15", f"{prefix}TimeoutStopSec": "10", "other": "x"})
    assert found == [("KillSignal", Variant("i", 15)), ("TimeoutStopUSec", Variant("t", 10_000_000))]
    for name, value in (("x", "1"), ("killSignal", "1"), ("Kill.Signal", "1"), ("TimeoutStopSec", "'soon'"), ("After", "soon")):
        with pytest.raises(Invalid, match=name.replace(".", r"\.")):
            properties_in({prefix + name: value})
