"""Label and field selectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.api import selectors
from nacre.api.status import Refusal

names = st.sampled_from(["app", "tier", "example.com/zone"])
values = st.sampled_from(["", "a", "b-1", "B_2"])
labelled = st.dictionaries(names, values)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("app=web", True),
        ("app==web,tier", True),
        ("app!=web", False),
        ("!gone", True),
        ("app in (web, shop)", True),
        ("app notin (web)", False),
        ("missing notin (web)", True),
        ("missing in (web)", False),
        ("size>3", True),
        ("size<3", False),
        ("app=", False),
        (" app = web , tier ", True),
    ],
)
def test_label_selectors_select(text: str, wanted: bool) -> None:
    test = selectors.labels(text)
    assert test is not None
    assert test({"app": "web", "tier": "x", "size": "7"}) is wanted


@given(labelled, names, values)
def test_a_requirement_and_its_opposite_part_all_objects(found: dict[str, str], name: str, value: str) -> None:
    equal, different = selectors.labels(f"{name}={value}"), selectors.labels(f"{name}!={value}")
    present, absent = selectors.labels(name), selectors.labels(f"!{name}")
    assert equal and different and present and absent
    assert equal(found) is not different(found)
    assert present(found) is not absent(found)


@pytest.mark.parametrize("text", ["=", "a=b=c", "a in", "a in (b", "a,,b", "a,", "!a=b", "a>b", "-a", "a=-b", "(a)", "a in b"])
def test_what_cannot_be_read_is_a_bad_request(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        selectors.labels(text)
    assert caught.value.code == 400


@given(st.text("ab=!,()<> in", max_size=20))
def test_any_text_is_a_selector_or_a_bad_request(text: str) -> None:
    try:
        test = selectors.labels(text)
    except Refusal:
        return
    if test is not None:
        test({"a": "b"})


def test_an_empty_selector_selects_everything() -> None:
    assert selectors.labels("") is None
    assert selectors.fields("", ("metadata.name",)) == []


def test_field_selectors_name_known_fields_only() -> None:
    known = ("metadata.name", "status.phase")
    assert selectors.fields("status.phase!=Failed,metadata.name=a", known) == [
        ("status.phase", False, "Failed"),
        ("metadata.name", True, "a"),
    ]
    with pytest.raises(Refusal, match=r"field label not supported: spec\.x"):
        selectors.fields("spec.x=1", known)
