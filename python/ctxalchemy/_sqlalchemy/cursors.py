"""Server-side cursors: a result that is streamed cannot use its connection after the connection was checked in.

A streamed result reads its rows from a cursor on the server.  When the transaction ends, the cursor ends too, and the
connection goes back to the pool.  Without this module, reading on would send a fetch on a connection that another
request has checked out meanwhile, and would abort the transaction of that request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import InvalidRequestError

from .._errors import see

if TYPE_CHECKING:
    from sqlalchemy import Dialect, PoolProxiedConnection


FETCHES = "ctxalchemy: fetches"
"""The key in the ``record_info`` of a connection for the number of tasks that are fetching rows from a cursor.

asyncpg holds no lock for this.  If no task is fetching, the key is missing.
"""
ON_FETCH = "ctxalchemy: on fetch"
"""The key in the ``record_info`` of a connection for a function that is called before (1) and after (-1) each fetch."""


def guard_cursors(dialect: Dialect) -> None:
    """Let each server-side cursor of this dialect raise if its connection was checked in.

    Only streamed results have such a cursor: other statements do not pay for this.
    """
    context_class: Any = dialect.execution_ctx_cls

    # Type checkers cannot know the base class: it depends on the dialect.
    class GuardedContext(context_class):  # type: ignore[misc]
        def create_server_side_cursor(self) -> Any:
            return ServerSideCursor(super().create_server_side_cursor(), self.root_connection.connection)

    dialect.execution_ctx_cls = GuardedContext


class ServerSideCursor:
    """A cursor of SQLAlchemy's adapter for a driver.

    Args:
        cursor: the cursor.
        proxied: the connection, as it was checked out of the pool.
    """

    def __init__(self, cursor: Any, proxied: PoolProxiedConnection) -> None:
        self._cursor = cursor
        self._proxied = proxied

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def fetchone(self) -> Any:
        return self._fetch(self._cursor.fetchone)

    def fetchmany(self, size: int | None = None) -> Any:
        return self._fetch(self._cursor.fetchmany, size)

    def fetchall(self) -> Any:
        return self._fetch(self._cursor.fetchall)

    def close(self) -> None:
        # Closing may send a statement, and the server has closed the cursor with its transaction.
        if self._proxied.is_valid:
            self._cursor.close()

    def _fetch(self, method: Callable[..., Any], *arguments: Any) -> Any:
        info = self._proxied.record_info if self._proxied.is_valid else None
        if info is None:
            raise InvalidRequestError(
                "this streamed result cannot be read any further: its transaction has ended; read the result before "
                "the transaction ends, or stream it in a transaction of its own"
                + see("guides/streams-and-background-tasks.md#stream-a-large-result")
            )
        info[FETCHES] = info.get(FETCHES, 0) + 1
        on_fetch: Callable[[int], None] | None = info.get(ON_FETCH)
        if on_fetch is not None:
            on_fetch(1)
        try:
            return method(*arguments)
        finally:
            info[FETCHES] -= 1
            if not info[FETCHES]:
                del info[FETCHES]
            if on_fetch is not None:
                on_fetch(-1)
