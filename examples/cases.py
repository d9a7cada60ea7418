"""What the demonstration asks of the service, in this order, and what it is promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A request, and all that may come of it."""

    what: str
    request: str
    json: Any = None
    outcome: str = "200"
    """The status, and the error that the server or a late task ends with."""
    body: bytes | None = None
    """What the client receives, where it matters."""
    at_once: frozenset[str] = frozenset()
    """New rows that are there when the response begins."""
    later: frozenset[str] = frozenset()
    """Further ones that are there once everything the request started is over."""
    deadline: str | None = None
    """The seconds after which the request is cancelled."""
    hang_up: bool = False
    """The client leaves after the first bytes of the body."""


def rows(*names: str) -> frozenset[str]:
    return frozenset(names)


CASES = [
    Case(
        "A write, seen from outside at once",
        "POST /customers",
        {"name": "Ada"},
        "201",
        at_once=rows("customer Ada"),
    ),
    Case(
        "A read",
        "GET /customers",
        body=b'["Ada"]',
    ),
    Case(
        "An exception after a write",
        "POST /import",
        ["Bob", ""],
        "500 ValueError",
    ),
    Case(
        "A handled error after a write",
        "POST /import",
        ["Bob", "Ada"],
        "409",
    ),
    Case(
        "A request cancelled by a deadline",
        "POST /customers",
        {"name": "Bob", "check_seconds": 60},
        "504",
        deadline="0.2",
    ),
    Case(
        "Two databases",
        "POST /orders",
        {"customer": "Ada", "item": "tea", "reference": "A-1"},
        "201",
        at_once=rows("order tea", "audit A-1"),
    ),
    Case(
        "The COMMIT itself fails",
        "POST /orders",
        {"customer": "Nobody", "item": "jam", "reference": "A-2"},
        "500 IntegrityError",
    ),
    Case(
        "One of the two refuses its row",
        "POST /orders",
        {"customer": "Ada", "item": "jam", "reference": "A-1"},
        "500 IntegrityError",
    ),
    # Two databases do not commit in one step: the error tells which of them did.
    Case(
        "Only the second COMMIT fails",
        "POST /orders",
        {"customer": "Ada", "item": "jam", "reference": "A-2", "clerk": "Nobody"},
        "500 PartialCommitError",
        at_once=rows("order jam"),
    ),
    Case(
        "A background task that writes",
        "POST /customers",
        {"name": "Bob", "letter": "Welcome."},
        "201",
        at_once=rows("customer Bob"),
        later=rows("letter Bob"),
    ),
    Case(
        "A background task that fails",
        "POST /customers",
        {"name": "Cyd", "letter": ""},
        "201 ValueError",
        at_once=rows("customer Cyd"),
    ),
    Case(
        "A stream that writes on its way",
        "POST /newsletter",
        {"to": ["Ada", "Cyd"], "reference": "N-1"},
        body=b"Ada\nCyd\n",
        later=rows("letter Ada", "letter Cyd", "audit N-1"),
    ),
    Case(
        "A stream that fails on its way",
        "POST /newsletter",
        {"to": ["Dan", ""], "reference": "N-2"},
        "200 ValueError",
        body=b"Dan\n",
        later=rows("letter Dan"),
    ),
    Case(
        "A client hangs up in mid-stream",
        "POST /newsletter",
        {"to": ["Eve", "Fay"], "reference": "N-3", "pause_seconds": 60},
        body=b"Eve\n",
        later=rows("letter Eve"),
        hang_up=True,
    ),
    Case(
        "Three queries at the same time",
        "GET /summary",
        body=b'{"customers":3,"orders":2,"letters":5}',
    ),
    Case(
        "A late task with its own context",
        "POST /reminders",
        {"to": "Gus", "own_context": True},
        "202",
        later=rows("letter Gus"),
    ),
    Case(
        "A late task without one",
        "POST /reminders",
        {"to": "Hal", "own_context": False},
        "202 ContextClosedError",
    ),
]
