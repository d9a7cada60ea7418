"""The exceptions of the package, and the messages that both backends raise.

``PartialCommitError`` is defined in ``_complete``, which raises it.
"""

from __future__ import annotations

DOCUMENTATION = "docs/"
"""Where the pages of the documentation are: in the repository, until a site is published."""


def see(page: str) -> str:
    """Return the end of a message: the page that explains it."""
    return f"; see {DOCUMENTATION}{page}"


class ContextNotInitiatedError(RuntimeError):
    """No context is current, or it belongs to the event loop of another thread, and the call needs one."""


class ContextClosedError(ContextNotInitiatedError):
    """The current context is closed: the caller outlives its request or block."""


class ContextAlreadyInitiatedError(RuntimeError):
    """A context cannot be opened because another one is open."""


class SessionNotReadyError(RuntimeError):
    """The session does not exist yet, and a synchronous call cannot wait until it is created."""


class MissingSettingsError(RuntimeError):
    """A transaction has begun without the transaction settings that its database requires."""


def no_context() -> ContextNotInitiatedError:
    """Return the error for a call without a context."""
    return ContextNotInitiatedError(
        "no database session context is open here: add the middleware to the application, "
        "or use run_in_new_ctx(), new_ctx() or init_db_session_ctx()"
        + see("faq.md#no-database-session-context-is-open-here")
    )


def closed_context() -> ContextClosedError:
    """Return the error for a call in a context that is closed."""
    return ContextClosedError(
        "the database session context is closed: this code outlives the request that started it; "
        "give it its own context with run_in_new_ctx() or new_ctx()"
        + see("guides/streams-and-background-tasks.md#a-task-that-outlives-its-request")
    )


def other_thread() -> ContextNotInitiatedError:
    """Return the error for a call in a thread whose event loop is not that of the context."""
    return ContextNotInitiatedError(
        "the database session context that is open here belongs to the event loop of another thread, and its sessions "
        "cannot be used in this thread: use the sessions outside of the thread, in an async function, or give this "
        "code its own context with run_in_new_ctx() or new_ctx()"
        + see("faq.md#no-database-session-context-is-open-here")
    )


def shared_on_another_loop() -> RuntimeError:
    """Return the error for using a database on another event loop than that of the test that shares its connection."""
    return RuntimeError(
        "a test shares its connection to this database (shared_session, put_savepoint_session_in_ctx), and this code "
        "runs in another event loop, such as that of a TestClient or a thread, which cannot use it: call the "
        "application with httpx.AsyncClient(transport=httpx.ASGITransport(app)) in the test, or test with separate "
        "sessions" + see("guides/testing.md#use-testclient")
    )


def not_shared(database: object) -> RuntimeError:
    """Return the error for creating a session that would commit for real, in a test that shares other connections."""
    return RuntimeError(
        f"this test shares its connections to other databases, and not to {database!r}: what a new session of this "
        "database writes would be committed for real; add the database to the fixture db_connections (or call "
        "put_savepoint_session_in_ctx for it), or use ctxalchemy.testing.allow_real_commits if this is intended"
        + see("guides/testing.md#test-with-several-databases")
    )


def context_already_open() -> ContextAlreadyInitiatedError:
    """Return the error for opening a context while another one is open."""
    return ContextAlreadyInitiatedError(
        "a database session context is already open here: reset it first, or pass force=True to open a nested one"
        + see("api/contexts.md")
    )


_AFTER_TRANSACTION = "_ctxalchemy_after_transaction"


def mark_as_after_transaction(error: BaseException) -> None:
    """Record that this error was raised by a callback, after a transaction had ended."""
    setattr(error, _AFTER_TRANSACTION, True)


def is_after_transaction(error: BaseException) -> bool:
    """Return whether a callback raised this error after a transaction had ended.  The transaction is not repeated."""
    return getattr(error, _AFTER_TRANSACTION, False)
