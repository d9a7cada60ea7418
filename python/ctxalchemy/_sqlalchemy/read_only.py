"""Read-only engines: the server refuses writes, and each statement is a transaction of its own.

Both are set when a connection is opened.  A statement then takes one round trip.  Ending the transaction of a session
takes none, because there is no transaction on the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from sqlalchemy import QueuePool, event

from .drivers import check_can_refuse_writes, is_autocommit, is_in_transaction, refuse_writes, request_read_only
from .internals import set_isolation_level_of_new_connections

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, PoolProxiedConnection
    from sqlalchemy.engine.interfaces import IsolationLevel
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

_LEFT = "ctxalchemy: left autocommit"
_SAVEPOINTS = "ctxalchemy: savepoints in a transaction"

_READ_ONLY = "ctxalchemy_is_read_only"
"""The attribute of the dialect of each engine in use: whether the engine is read-only."""

_levels: WeakKeyDictionary[Dialect, IsolationLevel] = WeakKeyDictionary()
"""The isolation levels of transactions on read-only engines, if ``create_engine`` was called with a level."""


def claim(engine: AsyncEngine, read_only: bool) -> None:
    """Use this engine, either as a read-only engine or for everything.

    Raises:
        ValueError: the engine is used for the other purpose already, or has connections already, or the database is not
            supported.
    """
    # Any: the dialect gets an attribute.
    dialect: Any = engine.dialect
    # Not ``event.contains``: it compares the id of the engine, which may be that of an engine that no longer exists.
    is_new = not hasattr(dialect, _READ_ONLY)
    # Another thread may claim the engine at the same time.
    if vars(dialect).setdefault(_READ_ONLY, read_only) != read_only:
        raise ValueError(
            "read_only_engine_creator must create an engine of its own: it returned an engine that is also used for "
            "writes"
        )
    if read_only and is_new:
        try:
            _make_read_only(engine)
        except BaseException:
            delattr(dialect, _READ_ONLY)
            raise


def is_read_only(dialect: Dialect) -> bool:
    """Return whether this is the dialect of a read-only engine."""
    return getattr(dialect, _READ_ONLY, False)


def leave_autocommit(connection: Connection) -> None:
    """Let the next statement begin a transaction on the server.  After this transaction, autocommit is used again.

    The transaction has the isolation level of ``create_engine(isolation_level=...)``, or else that of the server.

    If this is not the connection of a read-only engine, nothing happens.
    """
    # Any: SQLAlchemy's types do not know the adapter of a driver that is passed here.
    proxied, dialect = connection.connection, cast(Any, connection.dialect)
    if is_read_only(dialect) and is_autocommit(dialect, proxied):
        _info(proxied)[_LEFT] = True
        dialect.set_isolation_level(proxied.dbapi_connection, _levels.get(dialect) or dialect.default_isolation_level)


def _make_read_only(engine: AsyncEngine) -> None:
    # Any: the methods of the dialect are replaced.
    dialect: Any = engine.dialect
    check_can_refuse_writes(dialect)
    pool = engine.sync_engine.pool
    if isinstance(pool, QueuePool) and pool.checkedin() + pool.checkedout():
        raise ValueError(
            "read_only_engine_creator must return a new engine: this one has opened connections, which accept writes"
        )

    def on_connect(dbapi_connection: Any, pool_entry: ConnectionPoolEntry) -> None:
        # The entry may have had another connection before.
        for key in (_LEFT, _SAVEPOINTS):
            (pool_entry.record_info or {}).pop(key, None)
        try:
            dialect.set_isolation_level(dbapi_connection, "AUTOCOMMIT")
            refuse_writes(dialect, dbapi_connection)
        except BaseException:
            # SQLAlchemy 2.0 does not close a connection whose listener has failed.
            dialect.do_terminate(dbapi_connection)
            raise

    level = set_isolation_level_of_new_connections(dialect, "AUTOCOMMIT")
    if level is not None and level != "AUTOCOMMIT":
        _levels[dialect] = level
    event.listen(engine.sync_engine, "do_connect", request_read_only)
    event.listen(engine.sync_engine, "connect", on_connect)
    _skip_in_autocommit(dialect)
    _skip_savepoints_in_autocommit(dialect)
    if dialect.name == "postgresql":
        _stream_in_transactions(dialect)
        # SQLAlchemy resets the option ``postgresql_readonly`` to False, which would let the connection write.
        set_readonly = dialect.set_readonly
        dialect.set_readonly = lambda dbapi_connection, _value: set_readonly(dbapi_connection, True)


def _skip_in_autocommit(dialect: Any) -> None:
    """Do not end transactions that do not exist on the server.  The drivers for MySQL would send a ROLLBACK."""

    def ending(end: Callable[[PoolProxiedConnection], None]) -> Any:
        def end_transaction(dbapi_connection: PoolProxiedConnection) -> None:
            if is_autocommit(dialect, dbapi_connection):
                if is_in_transaction(dialect, dbapi_connection):
                    # The application has executed BEGIN as a statement.
                    _roll_back(dbapi_connection)
                return
            end(dbapi_connection)
            info = _info(dbapi_connection)
            info.pop(_SAVEPOINTS, None)
            if info.pop(_LEFT, False):
                dialect.set_isolation_level(dbapi_connection.dbapi_connection, "AUTOCOMMIT")

        return end_transaction

    dialect.do_commit = ending(dialect.do_commit)
    dialect.do_rollback = ending(dialect.do_rollback)


def _roll_back(connection: PoolProxiedConnection) -> None:
    # In autocommit, ``rollback()`` of some drivers sends nothing.
    cursor = connection.cursor()
    try:
        cursor.execute("ROLLBACK")
    finally:
        cursor.close()


def _skip_savepoints_in_autocommit(dialect: Any) -> None:
    """Do not send a savepoint outside a transaction, where it would fail: there are no writes that it could undo."""
    begin, release, roll_back_to = dialect.do_savepoint, dialect.do_release_savepoint, dialect.do_rollback_to_savepoint

    def do_savepoint(connection: Connection, name: str) -> None:
        if not is_autocommit(dialect, connection.connection):
            begin(connection, name)
            _info(connection.connection).setdefault(_SAVEPOINTS, set()).add(name)

    def do_release_savepoint(connection: Connection, name: str) -> None:
        if _has_savepoint(connection, name):
            release(connection, name)

    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        if _has_savepoint(connection, name):
            roll_back_to(connection, name)
        else:
            # If there is a transaction on the server, it has begun after the savepoint.
            dialect.do_rollback(connection.connection)

    dialect.do_savepoint = do_savepoint
    dialect.do_release_savepoint = do_release_savepoint
    dialect.do_rollback_to_savepoint = do_rollback_to_savepoint


def _has_savepoint(connection: Connection, name: str) -> bool:
    return name in _info(connection.connection).get(_SAVEPOINTS, ())


def _info(connection: PoolProxiedConnection) -> dict[str, Any]:
    # A detached connection has no record_info, and its pool does not use it again.
    return connection.info if connection.record_info is None else connection.record_info


def _stream_in_transactions(dialect: Any) -> None:
    """Stream results in transactions: PostgreSQL has no cursors outside of them."""
    context_class: Any = dialect.execution_ctx_cls

    # Type checkers cannot know the base class: it depends on the dialect.
    class StreamingContext(context_class):  # type: ignore[misc]
        def create_server_side_cursor(self) -> Any:
            leave_autocommit(self.root_connection)
            return super().create_server_side_cursor()

    dialect.execution_ctx_cls = StreamingContext
