"""Mocked sessions and patched methods are called, even if a mock has the ``__class__`` of a session."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, MagicMock, create_autospec

import pytest
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

MOCKS: dict[str, Callable[[], Any]] = {
    "without a spec": AsyncMock,
    "with a spec": lambda: AsyncMock(spec=AsyncSession),
    "with an autospec": lambda: create_autospec(AsyncSession, instance=True),
}


@pytest.mark.parametrize("mock", MOCKS)
async def test_mock_is_committed_and_closed(ctxalchemy: ModuleType, db: Any, mock: str) -> None:
    session = MOCKS[mock]()
    session.in_transaction = MagicMock(side_effect=[True, True, False, False, False, False])
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, session)
    session.commit.assert_awaited_once_with()
    session.close.assert_awaited_once_with()


@pytest.mark.parametrize("mock", MOCKS)
async def test_exception_of_a_mock_is_raised(ctxalchemy: ModuleType, db: Any, mock: str) -> None:
    session = MOCKS[mock]()
    session.in_transaction = MagicMock(return_value=True)
    session.commit.side_effect = LookupError("no")
    with pytest.raises(LookupError, match="no") as caught:
        async with ctxalchemy.new_ctx():
            ctxalchemy.put_db_session_to_context(db, session)
    assert getattr(caught.value, "__notes__", []) == []
    session.rollback.assert_awaited()
    session.close.assert_awaited_once_with()


async def test_method_patched_on_a_session_is_called(ctxalchemy: ModuleType, db: Any) -> None:
    session = await db.create_session()
    session.commit = AsyncMock(side_effect=LookupError("patched"))
    with pytest.raises(LookupError, match="patched"):  # noqa: PT012
        async with ctxalchemy.new_ctx():
            ctxalchemy.put_db_session_to_context(db, session)
            await session.begin()


async def test_method_patched_on_the_class_is_called(
    ctxalchemy: ModuleType, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AsyncSession, "commit", AsyncMock(side_effect=LookupError("patched")))
    with pytest.raises(LookupError, match="patched"):
        async with ctxalchemy.new_ctx():
            await (await ctxalchemy.db_session(db)).begin()


@pytest.mark.parametrize("connection", [MagicMock, lambda: create_autospec(Connection, instance=True)])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_session_on_a_mocked_engine_ends_without_a_warning(
    ctxalchemy: ModuleType, caplog: pytest.LogCaptureFixture, connection: Callable[[], Any], end: str
) -> None:
    """The session is a real one, and only its connection is a mock."""
    engine = MagicMock()
    mocked = engine.sync_engine.connect.return_value = connection()
    mocked.engine = MagicMock()
    mocked.in_transaction.return_value = False
    db = ctxalchemy.DBConnect(lambda _host: engine, async_sessionmaker, "host")
    with pytest.raises(LookupError) if end == "rollback" else nullcontext():
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            await session.run_sync(lambda sync_session: sync_session.connection())
            if end == "rollback":
                raise LookupError
            if end == "close":
                await ctxalchemy.close_db_session(db)
    mocked.close.assert_called_once_with()
    assert caplog.messages == []
