"""Settling a context with several sessions: the order, and what is left of it when something fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from support.database import Database, add_note, break_commit, checked_out
from support.interpreter import CANCELLATIONS_HAVE_CONTEXT
from support.sessions import Journal, Note, SessionDouble, keep_journal
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


async def test_committing_goes_through_all_sessions_step_by_step_in_the_order_they_were_made(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    journal: Journal = []
    names = {other: "first", connection: "second"}

    async def before_commit(session: Any) -> None:
        journal.append(("hook", session.info["name"]))
        assert await database.notes() == []

    async with ctxalchemy.new_ctx():
        for each, name in names.items():
            session = await ctxalchemy.db_session(each)
            session.info["name"] = name
            session.add(Note(name=name))
            keep_journal(journal, name, session)
        await ctxalchemy.commit_all_sessions(before_commit)
        assert journal == [(step, name) for step in ("hook", "flush", "commit") for name in ("first", "second")]
    assert await database.notes() == ["first", "second"]


async def test_only_sessions_in_a_transaction_are_touched(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    hooked = []

    async def before_commit(session: Any) -> None:
        hooked.append(session)

    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(connection)
        used = await ctxalchemy.db_session(other)
        await add_note(used, "used")
        await ctxalchemy.commit_all_sessions(before_commit)
        await ctxalchemy.commit_all_sessions(before_commit)
        await ctxalchemy.rollback_all_sessions()
        assert hooked == [used]
        assert await database.backends() == ["idle"]
    assert await database.notes() == ["used"]


async def test_sessions_stay_in_the_context_after_a_commit_and_after_a_rollback(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_ctx():
        sessions = [await ctxalchemy.db_session(each) for each in (connection, other)]
        for settle, name in ((ctxalchemy.commit_all_sessions, "kept"), (ctxalchemy.rollback_all_sessions, "undone")):
            for number, session in enumerate(sessions):
                await add_note(session, f"{name} {number}")
            await settle()
            assert [await ctxalchemy.db_session(each) for each in (connection, other)] == sessions
            assert await checked_out(connection) == await checked_out(other) == 0
    assert await database.notes() == ["kept 0", "kept 1"]


async def test_closing_all_undoes_what_is_open_and_the_next_use_makes_new_sessions(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_ctx():
        for name, each in (("first", connection), ("second", other)):
            await add_note(await ctxalchemy.db_session(each), name)
        closed = await ctxalchemy.db_session(connection)
        await ctxalchemy.close_all_sessions()
        assert await checked_out(connection) == await checked_out(other) == 0
        assert ctxalchemy.is_context_initiated()
        assert await ctxalchemy.db_session(connection) is not closed
    assert await database.notes() == []


@pytest.mark.parametrize(
    ("status", "notes"), [(100, ["made"]), (200, ["made"]), (399, ["made"]), (400, []), (404, []), (500, [])]
)
async def test_a_status_below_400_commits_and_any_other_rolls_back(
    ctxalchemy: ModuleType, database: Database, connection: Any, status: int, notes: list[str]
) -> None:
    hooked = []

    async def before_commit(session: Any) -> None:
        hooked.append(session)

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(connection), "made")
        await ctxalchemy.auto_commit_by_status_code(status, before_commit)
        assert await database.notes() == notes
        assert await checked_out(connection) == 0
        assert len(hooked) == len(notes)


async def test_a_failing_hook_rolls_everything_back_and_nothing_is_committed(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async def before_commit(session: Any) -> None:
        if session is second:
            raise LookupError("the hook")

    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(connection), await ctxalchemy.db_session(other)
        await add_note(first, "first")
        await add_note(second, "second")
        with pytest.raises(LookupError, match="the hook"):
            await ctxalchemy.commit_all_sessions(before_commit)
        assert [first.in_transaction(), second.in_transaction()] == [False, False]
        assert await checked_out(connection) == await checked_out(other) == 0
    assert await database.notes() == []


async def test_a_failing_flush_rolls_everything_back_and_nothing_is_committed(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(connection) as session:
        await add_note(session, "taken")
    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(connection), await ctxalchemy.db_session(other)
        first.add(Note(name="first"))
        second.add(Note(name="taken"))
        with pytest.raises(IntegrityError):
            await ctxalchemy.commit_all_sessions()
        assert [first.in_transaction(), second.in_transaction()] == [False, False]
        assert await checked_out(connection) == await checked_out(other) == 0
    assert await database.notes() == ["taken"]


async def test_a_failing_first_commit_rolls_everything_back_and_nothing_is_committed(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(connection), await ctxalchemy.db_session(other)
        await break_commit(first)
        await add_note(second, "second")
        with pytest.raises(DBAPIError):
            await ctxalchemy.commit_all_sessions()
        assert not second.in_transaction()
        assert await checked_out(connection) == await checked_out(other) == 0
    assert await database.notes() == []


async def test_a_commit_that_fails_after_another_succeeded_tells_which_are_committed(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any
) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(connection), "first")
        await break_commit(await ctxalchemy.db_session(other))
        await add_note(await ctxalchemy.db_session(third), "third")
        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await ctxalchemy.commit_all_sessions()
        assert tuple(caught.value.committed) == (connection,)
        assert tuple(caught.value.failed) == (other, third)
        assert isinstance(caught.value.__cause__, DBAPIError)
        for each in (connection, other, third):
            assert await checked_out(each) == 0
    assert await database.notes() == ["first"]


async def test_a_partial_commit_comes_through_where_a_context_settles_itself(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async def work() -> None:
        await add_note(await ctxalchemy.db_session(connection), "first")
        await break_commit(await ctxalchemy.db_session(other))

    with pytest.raises(ctxalchemy.PartialCommitError):
        await ctxalchemy.run_in_new_ctx(work)
    assert await database.notes() == ["first"]
    assert await checked_out(connection) == await checked_out(other) == 0


async def test_a_session_that_a_hook_begins_is_hooked_and_committed_too(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    hooked = []

    async def before_commit(session: Any) -> None:
        hooked.append(session)
        if len(hooked) == 1:
            await add_note(await ctxalchemy.db_session(other), "from the hook")

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(connection), "from the block")
        await ctxalchemy.commit_all_sessions(before_commit)
        assert hooked == [await ctxalchemy.db_session(connection), await ctxalchemy.db_session(other)]
        assert await database.notes() == ["from the block", "from the hook"]


async def test_a_session_that_is_begun_during_a_commit_is_committed_too(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    class Announcing(SessionDouble):
        async def commit(self) -> None:
            await add_note(await ctxalchemy.db_session(other), "from the commit")
            await super().commit()

    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(connection, Announcing([]))
        await ctxalchemy.commit_all_sessions()
        assert await database.notes() == ["from the commit"]


async def test_a_rollback_goes_on_after_a_failure(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(connection, SessionDouble([], rollback=OSError("cannot roll back")))
        await add_note(await ctxalchemy.db_session(other), "undone")
        with pytest.raises(OSError, match="cannot roll back"):
            await ctxalchemy.rollback_all_sessions()
        assert await checked_out(other) == 0
    assert await database.notes() == []


@pytest.mark.parametrize(("settle", "method"), [("rollback_all_sessions", "rollback"), ("close_all_sessions", "close")])
async def test_several_failures_are_raised_as_a_group(
    ctxalchemy: ModuleType, connection: Any, other: Any, third: Any, settle: str, method: str
) -> None:
    errors = [OSError("first"), LookupError("second"), KeyError("third")]
    journal: Journal = []
    async with ctxalchemy.new_ctx():
        for each, error in zip((connection, other, third), errors, strict=True):
            ctxalchemy.put_db_session_to_context(each, SessionDouble(journal, "double", **{method: error}))
        with pytest.raises(ExceptionGroup) as caught:
            await getattr(ctxalchemy, settle)()
        assert list(caught.value.exceptions) == errors
        assert journal.count((method, "double")) == 3


async def test_the_first_error_is_not_masked_by_what_fails_after_it(
    ctxalchemy: ModuleType, connection: Any, other: Any
) -> None:
    first = LookupError("the commit")
    doubles = [SessionDouble([], commit=first), SessionDouble([], rollback=OSError("the rollback"))]
    async with ctxalchemy.new_ctx():
        for each, double in zip((connection, other), doubles, strict=True):
            ctxalchemy.put_db_session_to_context(each, double)
        with pytest.raises(LookupError) as caught:
            await ctxalchemy.commit_all_sessions()
        assert caught.value is first
        assert "the rollback" in "".join(first.__notes__)


class SlowDouble(SessionDouble):
    """Its rollback waits at a gate."""

    def __init__(self, gate: Gate, **failures: Exception) -> None:
        super().__init__([], "slow", **failures)
        self._gate = gate

    async def rollback(self) -> None:
        await self._gate()
        await super().rollback()


async def _cancel_at(gate: Gate, settling: Any) -> asyncio.CancelledError:
    task = asyncio.create_task(settling)
    await gate.reached()
    task.cancel()
    # It is at the rollback even so, until that is through.
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    return raised.value


async def test_a_cancellation_while_the_rest_is_rolled_back_tells_what_was_committed(
    ctxalchemy: ModuleType, connection: Any, other: Any, third: Any
) -> None:
    gate = Gate()
    failure = ValueError("the second")
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(connection, SessionDouble([], "first"))
        ctxalchemy.put_db_session_to_context(other, SessionDouble([], "second", commit=failure))
        ctxalchemy.put_db_session_to_context(third, SlowDouble(gate))
        cancelled = await _cancel_at(gate, ctxalchemy.commit_all_sessions())
    assert cancelled.__notes__ == [str(ctxalchemy.PartialCommitError([connection], [other, third]))]
    assert cancelled.__context__ is failure or not CANCELLATIONS_HAVE_CONTEXT


async def test_a_cancellation_between_failed_rollbacks_tells_of_all_of_them(
    ctxalchemy: ModuleType, connection: Any, other: Any
) -> None:
    gate = Gate()
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(connection, SessionDouble([], "first", rollback=ValueError("the first")))
        ctxalchemy.put_db_session_to_context(other, SlowDouble(gate, rollback=ValueError("the second")))
        cancelled = await _cancel_at(gate, ctxalchemy.rollback_all_sessions())
    assert cancelled.__notes__ == [
        f"while sessions were being rolled back: ValueError: {which}" for which in ("the first", "the second")
    ]
