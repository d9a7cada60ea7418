"""The SQLAlchemy session of the current request, anywhere in an async service."""

from . import _fork as _fork
from ._api import (
    CurrentTransaction,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    get_db_session_from_context,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
    rollback_all_sessions,
    rollback_db_session,
    set_local,
)
from ._backend import BACKEND, db_session, db_session_nowait, init_db_session_ctx, is_context_initiated
from ._complete import BeforeCommitCallback, PartialCommitError
from ._context import new_ctx, reset_db_session_ctx, run_in_new_ctx
from ._db_connect import DBConnect
from ._errors import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
    MissingSettingsError,
    SessionNotReadyError,
)
from ._hooks import on_commit, on_rollback
from ._in_new_ctx import in_new_ctx
from ._middleware import ASGIHTTPDBSessionMiddleware, CommitIf, ReadOnlyIf

__version__ = "0.1.0"

__all__ = [
    "BACKEND",
    "ASGIHTTPDBSessionMiddleware",
    "BeforeCommitCallback",
    "CommitIf",
    "ContextAlreadyInitiatedError",
    "ContextClosedError",
    "ContextNotInitiatedError",
    "CurrentTransaction",
    "DBConnect",
    "MissingSettingsError",
    "PartialCommitError",
    "ReadOnlyIf",
    "SessionNotReadyError",
    "atomic_db_session",
    "auto_commit_by_status_code",
    "close_all_sessions",
    "close_db_session",
    "commit_all_sessions",
    "commit_db_session",
    "db_session",
    "db_session_nowait",
    "get_db_session_from_context",
    "in_new_ctx",
    "init_db_session_ctx",
    "is_context_initiated",
    "new_ctx",
    "new_non_ctx_atomic_session",
    "new_non_ctx_session",
    "on_commit",
    "on_rollback",
    "pop_db_session_from_context",
    "put_db_session_to_context",
    "reset_db_session_ctx",
    "rollback_all_sessions",
    "rollback_db_session",
    "run_in_new_ctx",
    "set_local",
]


def _show_as_own(names: list[str]) -> None:
    """Make reprs, pickles and the documentation name this module, and not the private module behind it."""
    for name in names:
        public = globals()[name]
        if getattr(public, "__module__", "").startswith(f"{__name__}."):
            public.__module__ = __name__


_show_as_own(__all__)
