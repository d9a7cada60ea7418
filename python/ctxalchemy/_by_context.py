"""A dictionary with a value for each context that has one."""

from __future__ import annotations

from typing import TypeVar
from weakref import ref

V = TypeVar("V")


class ByContext(dict[ref[object], V]):
    """Values by context.  They do not keep a context alive, and end with it.

    A ``WeakKeyDictionary`` would run Python code to check whether it is empty, which every request does.
    """

    def of(self, context: object) -> V | None:
        """Return the value of a context, or None."""
        return self.get(ref(context))

    def set(self, context: object, value: V) -> V:
        """Set the value of a context, and return it."""
        self[ref(context, self._remove)] = value
        return value

    def remove(self, context: object) -> None:
        """Remove the value of a context, if it has one."""
        self._remove(ref(context))

    def _remove(self, reference: ref[object]) -> None:
        self.pop(reference, None)
