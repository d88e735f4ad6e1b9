"""Frozen records for what a command loads at each start: as `dataclasses` makes them, without importing it.

`dataclasses` brings `inspect` along and compiles methods for every class: together half of what a `nacre-runc state` spent.
A Value's methods are written once and find the fields by name. Fields are annotations, in order; a dict given as default is copied.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing.TYPE_CHECKING to type checkers; typing itself takes 2 ms to load
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda made: made


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Value:
    """Fields by keyword; by position too in a class made with `kw_only=False`."""

    _names: ClassVar[tuple[str, ...]]
    _defaults: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, *, kw_only: bool = True) -> None:
        cls._names = tuple(cls.__annotations__)
        cls._defaults = {name: cls.__dict__[name] for name in cls._names if name in cls.__dict__}

    def __init__(self, *values: Any, **facts: Any) -> None:
        own = self.__dict__
        for name, default in self._defaults.items():
            own[name] = default.copy() if type(default) is dict else default
        own.update(zip(self._names, values, strict=False), **facts)
        if len(values) > len(self._names) or own.keys() != set(self._names):
            wrong = own.keys() ^ set(self._names)
            raise TypeError(f"{type(self).__name__}: {', '.join(sorted(wrong)) or 'too many values'}")

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed."""
        return type(self)(**self.__dict__ | changes)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__[name] for name in self._names))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in self._names)})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is not to be changed")
