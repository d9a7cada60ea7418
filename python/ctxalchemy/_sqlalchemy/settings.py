"""Apply transaction settings to the transactions of one session.

PostgreSQL resets a local setting when its transaction ends, and when the savepoint is rolled back in which it was set.
Listeners on the session apply all settings again, with one statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from sqlalchemy import TextClause, event, text
from sqlalchemy.exc import InvalidRequestError

from .._errors import MissingSettingsError, see
from .drivers import is_autocommit
from .internals import connections_of
from .read_only import leave_autocommit
from .shared import SharedSession

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

_PAGE = see("guides/multi-tenant.md")
_GET = text("SELECT current_setting(:name, true)")


class Settings:
    """The settings of one context for one database.

    Args:
        database: the database.  While this object exists, no other database has the same id.
        required: the names of the settings without which no transaction may begin.
        values: the values by name.
    """

    __slots__ = ("database", "required", "values")

    def __init__(self, database: object, required: tuple[str, ...], values: dict[str, str]) -> None:
        self.database = database
        self.required = required
        self.values = values


class SettingsListener:
    """Applies the settings of a context to the transactions of one session."""

    def __init__(self, session: Session, settings: Settings) -> None:
        self.settings = settings
        self._set_in_savepoint = False
        self._refused: SessionTransaction | None = None
        self._is_pending = False
        self._former: dict[str, str | None] = {}
        event.listen(session, "after_begin", self._on_begin)
        event.listen(session, "after_soft_rollback", self._on_rollback)
        if isinstance(session, SharedSession):
            event.listen(session, "before_commit", self._on_commit)

    def _on_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if not transaction.nested:
            self._set_in_savepoint = False
            self._former = {}
            self._apply(session, [connection])

    def _on_commit(self, session: Session) -> None:
        """Restore the former settings: the commit of a session of a test only releases a savepoint."""
        if not session.in_nested_transaction():
            for connection in connections_of(session):
                _set(connection, self._former)
            self._former = {}

    def _on_rollback(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested and self._set_in_savepoint:
            self.apply_now(session)

    def apply_now(self, session: Session) -> None:
        """Apply the settings to the open transaction.  If it has no connection yet, they are applied at its begin."""
        self._set_in_savepoint = session.in_nested_transaction()
        self._apply(session, [each for each in connections_of(session) if not each.closed and not each.invalidated])

    def apply_later(self, session: Session) -> None:
        """Apply the settings to the open transaction, if there is one, before its next statement."""
        for connection in connections_of(session):
            self._is_pending = True
            self._watch(session, connection)

    def _apply(self, session: Session, connections: Iterable[Connection]) -> None:
        self._refused = None
        self._is_pending = False
        for connection in connections:
            try:
                former = _values(connection, self.settings.values) if isinstance(session, SharedSession) else {}
                _execute(connection, self.settings)
                self._former = former | self._former
            except BaseException:
                # The session has its connection, and would execute the next statement without the settings.
                self._watch(session, connection)
                raise

    def _watch(self, session: Session, connection: Connection) -> None:
        """Refuse the statements of the open transaction, unless the settings can be applied first."""
        self._refused = session.get_transaction()
        if not event.contains(connection, "before_cursor_execute", self._before_execute):
            event.listen(connection, "before_cursor_execute", self._before_execute)

    def _before_execute(self, _connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if self._refused is None or not self._refused.is_active or statement.startswith("ROLLBACK"):
            return
        session = self._refused.session
        if isinstance(session, SharedSession) and session.shared.is_checking:
            return
        if self._is_pending:
            self.apply_now(session)
            return
        _check(self.settings)
        raise InvalidRequestError(
            "this transaction cannot be used, because its settings could not be applied: roll it back" + _PAGE
        )


def _execute(connection: Connection, settings: Settings) -> None:
    if not settings.required and not settings.values:
        return
    check_dialect(connection.dialect.name)
    _check(settings)
    # The settings end with a transaction, and the connections of a read-only engine are in none.
    leave_autocommit(connection)
    if is_autocommit(connection.dialect, connection.connection):
        raise InvalidRequestError(
            "transaction settings need a transaction, and this connection is in autocommit mode" + _PAGE
        )
    _set(connection, settings.values)


def _set(connection: Connection, values: Mapping[str, str | None]) -> None:
    if values:
        parameters: dict[str, str | None] = {}
        for number, (name, value) in enumerate(values.items()):
            parameters |= {f"name_{number}": name, f"value_{number}": value}
        connection.execute(_statement(len(values)), parameters).close()


def _values(connection: Connection, names: Iterable[str]) -> dict[str, str | None]:
    """Return the current values of these settings.  None stands for the default."""
    check_dialect(connection.dialect.name)
    return {name: connection.scalar(_GET, {"name": name}) for name in names}


def _check(settings: Settings) -> None:
    if missing := [name for name in settings.required if name not in settings.values]:
        raise MissingSettingsError(
            f"this database requires transaction settings that the context does not have: {', '.join(missing)}; "
            "call 'await set_local(connect, {...})' before the first statement" + _PAGE
        )


@lru_cache
def _statement(count: int) -> TextClause:
    return text("SELECT " + ", ".join(f"set_config(:name_{each}, :value_{each}, true)" for each in range(count)))


def check_dialect(name: str) -> None:
    """Raise if the database is not PostgreSQL."""
    if name != "postgresql":
        raise InvalidRequestError(f"transaction settings need PostgreSQL, and this database is {name}" + _PAGE)
