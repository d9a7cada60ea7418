"""Sessions that keep a journal: SQLAlchemy's own, subclasses of them, and test doubles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

if TYPE_CHECKING:
    from collections.abc import Callable

Journal = list[tuple[str, str]]
"""Pairs of an event and the name of its session, in the order in which they happened."""


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A row of the table ``note`` of ``Schema``, for tests of the unit of work."""

    __tablename__ = "note"

    name: Mapped[str] = mapped_column(primary_key=True)


def keep_journal(journal: Journal, name: str, session: AsyncSession) -> None:
    """Add an entry to the journal each time SQLAlchemy flushes, commits or rolls back this session."""

    def write(what: str) -> Callable[..., None]:
        return lambda *_: journal.append((what, name))

    for event_name, what in (("after_flush", "flush"), ("after_commit", "commit"), ("after_rollback", "rollback")):
        event.listen(session.sync_session, event_name, write(what))


class OverriddenSession(AsyncSession):
    """A subclass as users write it: it overrides ``commit``, ``rollback`` and ``close``."""

    async def commit(self) -> None:
        self.info["journal"].append(("commit", "overridden"))
        await super().commit()

    async def rollback(self) -> None:
        self.info["journal"].append(("rollback", "overridden"))
        await super().rollback()

    async def close(self) -> None:
        self.info["journal"].append(("close", "overridden"))
        await super().close()


class ClosingSession(Session):
    """A session that adds an entry to its journal when it is made and each time it is closed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.info["journal"].append(("make", "session"))

    def close(self) -> None:
        self.info["journal"].append(("close", "session"))
        super().close()


def maker_creator(**options: Any) -> Callable[[AsyncEngine], async_sessionmaker[Any]]:
    """Return a ``session_maker_creator`` whose session makers have these options."""

    def create(engine: AsyncEngine) -> async_sessionmaker[Any]:
        return async_sessionmaker(engine, expire_on_commit=False, **options)

    return create


class SessionDouble:
    """A test double that a user may put into a context: it has only public methods of a session.

    Args:
        journal: receives an entry for each call.
        name: the name of the double in the journal.
        failures: for each method name, the error that the method raises.
    """

    def __init__(self, journal: Journal, name: str = "double", **failures: Exception) -> None:
        self._journal = journal
        self._name = name
        self._failures = failures
        self._begun = True

    def in_transaction(self) -> bool:
        return self._begun

    async def begin(self) -> None:
        self._begun = True
        self._happen("begin")

    async def flush(self) -> None:
        self._happen("flush")

    async def commit(self) -> None:
        self._begun = False
        self._happen("commit")

    async def rollback(self) -> None:
        self._begun = False
        self._happen("rollback")

    async def close(self) -> None:
        self._begun = False
        self._happen("close")

    def _happen(self, what: str) -> None:
        self._journal.append((what, self._name))
        if what in self._failures:
            raise self._failures[what]
