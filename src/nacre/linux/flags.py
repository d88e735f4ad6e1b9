"""Families of flags: to type checkers `enum.IntFlag`, at run time as much of it as is used here, since enum takes 4 ms of every command."""

from __future__ import annotations

__all__ = ["Flags"]

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from enum import IntFlag as Flags
else:

    class Flags(int):
        """An integer of a class whose integer attributes are its members; what is made of members by | & ^ ~ is of the class too."""

        def __init_subclass__(cls):
            cls._members = {name: cls(value) for name, value in vars(cls).items() if type(value) is int}
            for name, member in cls._members.items():
                setattr(cls, name, member)

        @property
        def name(self):
            """Of a member, or of the members that are all of it, joined by |; None of anything else."""
            for name, member in self._members.items():
                if member == self:
                    return name
            parts = [name for name, member in self._members.items() if member and member & ~self == 0]
            return "|".join(parts) if parts and sum({self._members[name] for name in parts}) == self else None

        def __repr__(self):
            return f"{type(self).__name__}.{self.name}" if self.name else f"{type(self).__name__}({int(self)})"

        def __or__(self, other):
            return type(self)(int(self) | other)

        def __and__(self, other):
            return type(self)(int(self) & other)

        def __xor__(self, other):
            return type(self)(int(self) ^ other)

        def __invert__(self):
            return type(self)(~int(self))

        __ror__, __rand__, __rxor__ = __or__, __and__, __xor__
