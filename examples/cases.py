"""The requests that the demonstration sends, in this order, and what is promised for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A request and its promised results."""

    scenario: str
    request: str
    json: Any = None
    outcome: str = "200"
    """The status, followed by the exception that the server or a task of the request logs, if any."""
    body: bytes | None = None
    """The body that the client receives. None means that the body is not checked."""
    rows_at_start: frozenset[str] = frozenset()
    """New rows that are committed when the response starts."""
    later_rows: frozenset[str] = frozenset()
    """Further rows that are committed when the request and all its tasks have ended."""
    deadline: str | None = None
    """The number of seconds after which the request is cancelled."""
    disconnect: bool = False
    """Whether the client disconnects after the first bytes of the body."""


def rows(*names: str) -> frozenset[str]:
    return frozenset(names)


CASES = [
    Case(
        "A write is visible at response start",
        "POST /customers",
        {"name": "Ada"},
        "201",
        rows_at_start=rows("customer Ada"),
    ),
    Case(
        "A request only reads",
        "GET /customers",
        body=b'["Ada"]',
    ),
    Case(
        "A handler raises after a write",
        "POST /import",
        ["Bob", ""],
        "500 ValueError",
    ),
    Case(
        "A handler returns 409 after a write",
        "POST /import",
        ["Bob", "Ada"],
        "409",
    ),
    Case(
        "A handler writes a duplicate",
        "POST /customers",
        {"name": "Ada"},
        "409",
    ),
    Case(
        "A deadline cancels the request",
        "POST /customers",
        {"name": "Bob", "check_seconds": 60},
        "504",
        deadline="0.2",
    ),
    Case(
        "A request writes to two databases",
        "POST /orders",
        {"customer": "Ada", "item": "tea", "reference": "A-1"},
        "201",
        rows_at_start=rows("order tea", "audit A-1"),
    ),
    Case(
        "The first of two COMMITs fails",
        "POST /orders",
        {"customer": "Nobody", "item": "jam", "reference": "A-2"},
        "409",
    ),
    Case(
        "The second of two INSERTs fails",
        "POST /orders",
        {"customer": "Ada", "item": "jam", "reference": "A-1"},
        "409",
    ),
    # Two databases cannot commit atomically. PartialCommitError names the databases that were committed.
    Case(
        "The second of two COMMITs fails",
        "POST /orders",
        {"customer": "Ada", "item": "jam", "reference": "A-2", "clerk": "Nobody"},
        "500 PartialCommitError",
        rows_at_start=rows("order jam"),
    ),
    Case(
        "A background task writes",
        "POST /customers",
        {"name": "Bob", "letter": "Welcome."},
        "201",
        rows_at_start=rows("customer Bob"),
        later_rows=rows("letter Bob"),
    ),
    Case(
        "A background task fails",
        "POST /customers",
        {"name": "Cyd", "letter": ""},
        "201 ValueError",
        rows_at_start=rows("customer Cyd"),
    ),
    Case(
        "A stream writes while it is sent",
        "POST /newsletter",
        {"to": ["Ada", "Cyd"], "reference": "N-1"},
        body=b"Ada\nCyd\n",
        later_rows=rows("letter Ada", "letter Cyd", "audit N-1"),
    ),
    Case(
        "A stream fails while it is sent",
        "POST /newsletter",
        {"to": ["Dan", ""], "reference": "N-2"},
        "200 ValueError",
        body=b"Dan\n",
        later_rows=rows("letter Dan"),
    ),
    Case(
        "The client disconnects during a stream",
        "POST /newsletter",
        {"to": ["Eve", "Fay"], "reference": "N-3", "pause_seconds": 60},
        body=b"Eve\n",
        later_rows=rows("letter Eve"),
        disconnect=True,
    ),
    Case(
        "Three queries run concurrently",
        "GET /summary",
        body=b'{"customers":3,"orders":2,"letters":5}',
    ),
    Case(
        "A task outlives its request (new_ctx)",
        "POST /reminders",
        {"to": "Gus", "own_context": True},
        "202",
        later_rows=rows("letter Gus"),
    ),
    Case(
        "A task outlives its request (no new_ctx)",
        "POST /reminders",
        {"to": "Hal", "own_context": False},
        "202 ContextClosedError",
    ),
]
