"""The exceptions of the package, and the wording of those that both backends raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._connection import DBConnect

DOCUMENTATION = "docs/"
"""Where the pages are: in the repository.  Once they are published: their address."""


def see(page: str) -> str:
    """The end of a message: where to read on."""
    return f"; see {DOCUMENTATION}{page}"


class ContextNotInitiatedError(RuntimeError):
    """No context is current where one is needed."""


class ContextClosedError(ContextNotInitiatedError):
    """The current context has closed: the caller outlived the request (or block) it belongs to."""


class ContextAlreadyInitiatedError(RuntimeError):
    """A context is opened while another one is open."""


class SessionNotReadyError(RuntimeError):
    """The session does not exist yet, and making it has to wait, which a synchronous call cannot."""


class PartialCommitError(RuntimeError):
    """A commit failed after those of other sessions had succeeded.

    The first error is its ``__cause__``.

    Attributes:
        committed: the connections whose sessions were committed, in that order.
        failed: the connections whose sessions were not: first the one whose commit failed, then
            those that were rolled back because of it.
    """

    def __init__(self, committed: Sequence[DBConnect], failed: Sequence[DBConnect]) -> None:
        self.committed: tuple[DBConnect, ...] = tuple(committed)
        self.failed: tuple[DBConnect, ...] = tuple(failed)
        super().__init__(self.committed, self.failed)

    def __str__(self) -> str:
        return (
            f"{len(self.committed)} session(s) had been committed when the commit of another failed; "
            f"committed: {_names(self.committed)}; not committed: {_names(self.failed)}"
            + see("guides/several-databases.md")
        )


def _names(connections: Sequence[DBConnect]) -> str:
    return ", ".join(map(repr, connections))


def no_context() -> ContextNotInitiatedError:
    """The error for a call without a context."""
    return ContextNotInitiatedError(
        "no database session context is open here: add the middleware to the application, "
        "or use run_in_new_ctx(), new_ctx() or init_db_session_ctx()"
        + see("faq.md#no-database-session-context-is-open-here")
    )


def closed_context() -> ContextClosedError:
    """The error for a call in a context that has closed."""
    return ContextClosedError(
        "the database session context has closed: this code outlived the request it was started in; "
        "give it a context of its own with run_in_new_ctx() or new_ctx()"
        + see("guides/streams-and-background-tasks.md#a-task-that-outlives-its-request")
    )


def context_already_open() -> ContextAlreadyInitiatedError:
    """The error for opening a context while one is open."""
    return ContextAlreadyInitiatedError(
        "a database session context is already open here: reset it first, or pass force=True to nest another"
        + see("api.md#contexts")
    )
