"""Sessions that keep a journal: real ones, overridden ones, and doubles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

if TYPE_CHECKING:
    from collections.abc import Callable

Journal = list[tuple[str, str]]
"""What happened to which session, in this order."""


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A row of ``Database``'s table, for what only the unit of work can show."""

    __tablename__ = "note"

    name: Mapped[str] = mapped_column(primary_key=True)


def keep_journal(journal: Journal, name: str, session: AsyncSession) -> None:
    """Write down when SQLAlchemy itself flushes, commits and rolls back this session."""

    def write(what: str) -> Callable[..., None]:
        return lambda *_: journal.append((what, name))

    for happening, what in (("after_flush", "flush"), ("after_commit", "commit"), ("after_rollback", "rollback")):
        event.listen(session.sync_session, happening, write(what))


class OverriddenSession(AsyncSession):
    """A subclass of the kind that users write: it overrides how a session ends."""

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
    """A session that says when it is made and when it is closed, by whichever way."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.info["journal"].append(("make", "session"))

    def close(self) -> None:
        self.info["journal"].append(("close", "session"))
        super().close()


def maker_creator(**options: Any) -> Callable[[AsyncEngine], async_sessionmaker[Any]]:
    """A ``session_maker_creator`` with these options for the session maker."""

    def create(engine: AsyncEngine) -> async_sessionmaker[Any]:
        return async_sessionmaker(engine, expire_on_commit=False, **options)

    return create


class SessionDouble:
    """What a user's test puts into a context: an object with a session's public methods, and no other.

    Args:
        journal: what happens to it is written here.
        name: its name there.
        failures: what the method of that name raises.
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
