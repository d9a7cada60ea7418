"""A request that a test makes in its context: the sessions of the test are lent to the context of the request.

The request has a context of its own, as in production.  It completes the sessions on the connection of the test as it
would complete its own, and does not close them.  Other sessions that the test has put into its context are used, and
left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import Token
from typing import TYPE_CHECKING, Any
from weakref import ref

from sqlalchemy import inspect
from sqlalchemy.orm.attributes import set_committed_value

from . import _complete
from ._backend import SessionStore, current_context
from ._create_session import put_existing_session
from ._db_connect import shared_connection
from ._holder import SCOPE_KEY
from ._sqlalchemy.internals import reopen
from ._sqlalchemy.session import commit_session
from ._sqlalchemy.shared import SharedSession, shared_session_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from ._db_connect import DBConnect


_loans: Counter[int] = Counter()
"""To how many requests each session is lent.  Concurrent requests share the sessions that they leave alone."""


def find_loan(scope: Mapping[str, Any], outer: SessionStore | None) -> Loan | None:
    """Return what a test lends to this request, or None if no test that shares its connection makes this request.

    Args:
        scope: the scope of the request.
        outer: the current context, which the request joins.
    """
    if outer is None or scope.get(SCOPE_KEY) is outer:
        return None
    return Loan(outer) if any(shared_session_of(session) for _, session in outer.items()) else None


class Loan:
    """The sessions of a test that are lent to the context of a request.

    Args:
        outer: the context of the test.
    """

    def __init__(self, outer: SessionStore) -> None:
        self._outer = outer
        self._lent: list[tuple[DBConnect, AsyncSession]] = []
        self._values: list[tuple[SharedSession, object, dict[str, Any]]] = []

    async def begin(self, store: SessionStore) -> None:
        """Lend the sessions, except those that another request is using, or that are not read-only as this request.

        For these databases, the request creates sessions of its own.

        Args:
            store: the context of the request.

        Raises:
            RuntimeError: the request runs in another event loop than the test.
            Exception: what the test itself had done could not be committed to a savepoint.
        """
        for database, session in self._outer.items():
            sync_session = shared_session_of(session)
            if sync_session is not None:
                shared_connection(database)
                if id(session) in _complete.lent or store.read_only:
                    continue
            self._lent.append((database, session))
            _loans[id(session)] += 1
            _complete.lent[id(session)] = sync_session is not None
            if sync_session is not None:
                await self._prepare(session, sync_session)
                sync_session.turn.context = ref(store)
            put_existing_session(store, database, session)

    async def _prepare(self, session: AsyncSession, sync_session: SharedSession) -> None:
        """Commit what the test itself has done to a savepoint, so that a rollback of the request does not undo it."""
        if session.in_transaction():
            expire_on_commit, sync_session.expire_on_commit = sync_session.expire_on_commit, False
            try:
                await _complete.with_callbacks(self._outer, commit_session(session))
            except Exception as error:
                error.add_note("before a request, the work of the test itself is committed to a savepoint")
                raise
            finally:
                sync_session.expire_on_commit = expire_on_commit
        sync_session.turn.has_committed = False
        self._values += [(sync_session, each, _loaded_columns(each)) for each in sync_session.identity_map.values()]

    def end(self) -> None:
        """Give the sessions back to the test, which can go on using them and the objects that it has loaded."""
        for database, session in self._lent:
            _loans[id(session)] -= 1
            if not _loans[id(session)]:
                del _loans[id(session)], _complete.lent[id(session)]
            if (sync_session := shared_session_of(session)) is not None:
                sync_session.turn.context = None
                # The application may have closed it.
                reopen(sync_session)
            if not self._outer.closed and self._outer.get(database) is session:
                put_existing_session(self._outer, database, session)
        for sync_session, instance, values in self._values:
            state: Any = inspect(instance)
            # A rollback expires all objects, and these are as they were.
            if state.expired and state.session is sync_session and not sync_session.turn.has_committed:
                for name, value in values.items():
                    set_committed_value(instance, name, value)


def lineage() -> tuple[ref[SessionStore], ...]:
    """Return the current context and the outer ones."""
    contexts = []
    store = current_context()
    while store is not None:
        contexts.append(ref(store))
        outer = None if store.token is None else store.token.old_value
        store = None if outer is Token.MISSING else outer
    return tuple(contexts)


def _loaded_columns(instance: object) -> dict[str, Any]:
    state: Any = inspect(instance)
    return {name: state.dict[name] for name in state.mapper.column_attrs.keys() if name in state.dict}  # noqa: SIM118
