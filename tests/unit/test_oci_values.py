"""oci.values: records that behave as frozen dataclasses do."""

from __future__ import annotations

import copy
import pickle

import pytest

from nacre.oci.values import Value


class Point(Value, kw_only=False):
    x: int
    y: int = 0
    notes: dict[str, str] = {}


def test_fields_are_given_by_name_or_by_position() -> None:
    assert Point(1, y=2) == Point(x=1, y=2) != Point(1)
    assert repr(Point(1)) == "Point(x=1, y=0, notes={})"


@pytest.mark.parametrize("facts", [{}, {"x": 1, "z": 2}])
def test_a_missing_or_unknown_field_is_refused_by_name(facts: dict[str, int]) -> None:
    with pytest.raises(TypeError, match=r"^Point: [xz]$"):
        Point(**facts)  # type: ignore[arg-type]


def test_too_many_values_are_refused() -> None:
    with pytest.raises(TypeError, match="too many"):
        Point(1, 2, {}, 4)  # type: ignore[call-arg]


def test_a_value_does_not_change_and_but_makes_another() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match=r"Point\.x"):
        point.x = 2  # type: ignore[misc]
    assert point.but(y=3) == Point(1, 3)
    assert point == Point(1)


def test_a_default_dictionary_is_not_shared() -> None:
    first = Point(1)
    first.notes["a"] = "b"
    assert Point(1).notes == {}


def test_values_survive_copy_and_pickle() -> None:
    assert copy.deepcopy(Point(1, 2)) == pickle.loads(pickle.dumps(Point(1, 2))) == Point(1, 2)
