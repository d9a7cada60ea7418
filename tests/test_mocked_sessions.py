"""Mocked sessions and patched methods are called, even if a mock has the ``__class__`` of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, MagicMock, create_autospec

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

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
