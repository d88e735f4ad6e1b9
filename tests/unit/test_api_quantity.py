"""Quantities in canonical form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.api import quantity
from nacre.controllers.quantity import milli


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.5", "500m"), ("1000m", "1"), ("1.5Gi", "1536Mi"), ("1024Mi", "1Gi"), ("1024", "1024"), ("1000", "1k"), ("0", "0"),
        ("-1.5", "-1500m"), ("1e3", "1e3"), ("12e6", "12e6"), ("0.001Ki", "1024m"), (".5Gi", "512Mi"), ("5.", "5"), ("1E", "1E"),
    ],
)  # fmt: skip
def test_a_quantity_is_written_as_kubernetes_writes_it(text: str, wanted: str) -> None:
    assert quantity.canonical(text) == wanted


@given(st.integers(-(10**15), 10**15), st.sampled_from(["", "m", "k", "Ki", "Mi", "e3", "n"]))
def test_the_canonical_form_is_the_same_amount_and_stays(number: int, suffix: str) -> None:
    shown = quantity.canonical(f"{number}{suffix}")
    assert quantity.nano(shown) == quantity.nano(f"{number}{suffix}")
    assert quantity.canonical(shown) == shown


@given(st.integers(0, 10**9), st.sampled_from(["", "m", "k", "Ki", "Mi", "e3"]))
def test_the_schedulers_reading_is_the_servers(number: int, suffix: str) -> None:
    text = quantity.canonical(f"{number}{suffix}")
    assert milli(text) == -(-quantity.nano(text) // 10**6)


@pytest.mark.parametrize("text", ["", "x", "1x", "1 Gi", "--1", "1Kib", "1e", "1.2.3", "e3"])
def test_what_is_none_is_refused_in_kubernetes_words(text: str) -> None:
    with pytest.raises(quantity.NotAQuantity, match="quantities must match the regular expression"):
        quantity.canonical(text)
