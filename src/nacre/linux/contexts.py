"""Undoing what was done: `ExitStack` and `contextmanager` of contextlib to type checkers, at run time as much of them as is used here.

contextlib takes functools and collections along, 3 ms of every create. No block swallows an exception with these.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from contextlib import ExitStack, contextmanager
else:

    class ExitStack:
        """The last that was entered or named is undone first; each is, whatever the others raise."""

        def __init__(self):
            self._exits = []

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            if self._exits:
                try:
                    self._exits.pop()(*problem)
                finally:
                    self.__exit__(*problem)

        def enter_context(self, manager):
            value = manager.__enter__()
            self._exits.append(manager.__exit__)
            return value

        def callback(self, function, *arguments, **settings):
            self._exits.append(lambda *_: function(*arguments, **settings))

        def pop_all(self):
            """Everything to be undone, as a stack of its own; this one is empty then."""
            other = type(self)()
            self._exits, other._exits = other._exits, self._exits
            return other

        def close(self):
            self.__exit__(None, None, None)

    def contextmanager(function):
        return lambda *arguments, **settings: _Block(function(*arguments, **settings))

    class _Block:
        """A generator that yields once, at the place of the block."""

        def __init__(self, steps):
            self._steps = steps

        def __enter__(self):
            return next(self._steps)

        def __exit__(self, _kind, problem, _trace):
            if problem is not None:
                self._steps.throw(problem)
            elif next(self._steps, self) is not self:
                raise RuntimeError("a block has one yield")


__all__ = ["ExitStack", "contextmanager"]
