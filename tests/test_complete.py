"""Completing a context commits or rolls back its sessions in order, and an error never hides what was committed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from support.interpreter import CANCELLATIONS_HAVE_CONTEXT
from support.schema import Schema, add_note, break_commit, checked_out
from support.sessions import Journal, Note, SessionDouble, keep_journal
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


async def test_each_step_of_a_commit_covers_all_sessions_in_the_order_they_were_made(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    journal: Journal = []
    names = {other_db: "first", db: "second"}

    async def before_commit(session: Any) -> None:
        journal.append(("hook", session.info["name"]))
        assert await schema.notes() == []

    async with ctxalchemy.new_ctx():
        for each, name in names.items():
            session = await ctxalchemy.db_session(each)
            session.info["name"] = name
            session.add(Note(name=name))
            keep_journal(journal, name, session)
        await ctxalchemy.commit_all_sessions(before_commit)
        assert journal == [(step, name) for step in ("hook", "flush", "commit") for name in ("first", "second")]
    assert await schema.notes() == ["first", "second"]


async def test_only_sessions_in_a_transaction_are_touched(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    hooked = []

    async def before_commit(session: Any) -> None:
        hooked.append(session)

    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(db)
        used = await ctxalchemy.db_session(other_db)
        await add_note(used, "used")
        await ctxalchemy.commit_all_sessions(before_commit)
        await ctxalchemy.commit_all_sessions(before_commit)
        await ctxalchemy.rollback_all_sessions()
        assert hooked == [used]
        assert await schema.backends() == ["idle"]
    assert await schema.notes() == ["used"]


async def test_sessions_stay_in_the_context_after_commit_and_rollback(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        sessions = [await ctxalchemy.db_session(each) for each in (db, other_db)]
        for complete, name in (
            (ctxalchemy.commit_all_sessions, "committed"),
            (ctxalchemy.rollback_all_sessions, "rolled back"),
        ):
            for number, session in enumerate(sessions):
                await add_note(session, f"{name} {number}")
            await complete()
            assert [await ctxalchemy.db_session(each) for each in (db, other_db)] == sessions
            assert await checked_out(db) == await checked_out(other_db) == 0
    assert await schema.notes() == ["committed 0", "committed 1"]


async def test_close_all_sessions_rolls_back_and_the_next_call_makes_new_sessions(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        for name, each in (("first", db), ("second", other_db)):
            await add_note(await ctxalchemy.db_session(each), name)
        closed = await ctxalchemy.db_session(db)
        await ctxalchemy.close_all_sessions()
        assert await checked_out(db) == await checked_out(other_db) == 0
        assert ctxalchemy.is_context_initiated()
        assert await ctxalchemy.db_session(db) is not closed
    assert await schema.notes() == []


@pytest.mark.parametrize(
    ("status", "notes"), [(100, ["made"]), (200, ["made"]), (399, ["made"]), (400, []), (404, []), (500, [])]
)
async def test_status_below_400_commits_and_any_other_status_rolls_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any, status: int, notes: list[str]
) -> None:
    hooked = []

    async def before_commit(session: Any) -> None:
        hooked.append(session)

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "made")
        await ctxalchemy.auto_commit_by_status_code(status, before_commit)
        assert await schema.notes() == notes
        assert await checked_out(db) == 0
        assert len(hooked) == len(notes)


async def test_failing_hook_rolls_all_sessions_back_and_nothing_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def before_commit(session: Any) -> None:
        if session is second:
            raise LookupError("the hook")

    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)
        await add_note(first, "first")
        await add_note(second, "second")
        with pytest.raises(LookupError, match="the hook"):
            await ctxalchemy.commit_all_sessions(before_commit)
        assert [first.in_transaction(), second.in_transaction()] == [False, False]
        assert await checked_out(db) == await checked_out(other_db) == 0
    assert await schema.notes() == []


async def test_failing_flush_rolls_all_sessions_back_and_nothing_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
        await add_note(session, "taken")
    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)
        first.add(Note(name="first"))
        second.add(Note(name="taken"))
        with pytest.raises(IntegrityError):
            await ctxalchemy.commit_all_sessions()
        assert [first.in_transaction(), second.in_transaction()] == [False, False]
        assert await checked_out(db) == await checked_out(other_db) == 0
    assert await schema.notes() == ["taken"]


async def test_failing_first_commit_rolls_all_sessions_back_and_nothing_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)
        await break_commit(first)
        await add_note(second, "second")
        with pytest.raises(DBAPIError):
            await ctxalchemy.commit_all_sessions()
        assert not second.in_transaction()
        assert await checked_out(db) == await checked_out(other_db) == 0
    assert await schema.notes() == []


async def test_partial_commit_error_contains_the_committed_and_the_failed_databases(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "first")
        await break_commit(await ctxalchemy.db_session(other_db))
        await add_note(await ctxalchemy.db_session(third_db), "third")
        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await ctxalchemy.commit_all_sessions()
        assert tuple(caught.value.committed) == (db,)
        assert tuple(caught.value.failed) == (other_db, third_db)
        assert isinstance(caught.value.__cause__, DBAPIError)
        for each in (db, other_db, third_db):
            assert await checked_out(each) == 0
    assert await schema.notes() == ["first"]


async def test_run_in_new_ctx_raises_partial_commit_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "first")
        await break_commit(await ctxalchemy.db_session(other_db))

    with pytest.raises(ctxalchemy.PartialCommitError):
        await ctxalchemy.run_in_new_ctx(work)
    assert await schema.notes() == ["first"]
    assert await checked_out(db) == await checked_out(other_db) == 0


async def test_session_that_a_hook_begins_is_passed_to_the_hook_and_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    hooked = []

    async def before_commit(session: Any) -> None:
        hooked.append(session)
        if len(hooked) == 1:
            await add_note(await ctxalchemy.db_session(other_db), "from the hook")

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "from the block")
        await ctxalchemy.commit_all_sessions(before_commit)
        assert hooked == [await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)]
        assert await schema.notes() == ["from the block", "from the hook"]


async def test_session_that_begins_during_a_commit_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    class WritingDouble(SessionDouble):
        async def commit(self) -> None:
            await add_note(await ctxalchemy.db_session(other_db), "from the commit")
            await super().commit()

    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, WritingDouble([]))
        await ctxalchemy.commit_all_sessions()
        assert await schema.notes() == ["from the commit"]


async def test_rollback_of_all_sessions_continues_after_a_failure(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, SessionDouble([], rollback=OSError("cannot roll back")))
        await add_note(await ctxalchemy.db_session(other_db), "rolled back")
        with pytest.raises(OSError, match="cannot roll back"):
            await ctxalchemy.rollback_all_sessions()
        assert await checked_out(other_db) == 0
    assert await schema.notes() == []


@pytest.mark.parametrize(
    ("function", "method"), [("rollback_all_sessions", "rollback"), ("close_all_sessions", "close")]
)
async def test_several_failures_are_raised_as_a_group(
    ctxalchemy: ModuleType, db: Any, other_db: Any, third_db: Any, function: str, method: str
) -> None:
    errors = [OSError("first"), LookupError("second"), KeyError("third")]
    journal: Journal = []
    async with ctxalchemy.new_ctx():
        for each, error in zip((db, other_db, third_db), errors, strict=True):
            ctxalchemy.put_db_session_to_context(each, SessionDouble(journal, "double", **{method: error}))
        with pytest.raises(ExceptionGroup) as caught:
            await getattr(ctxalchemy, function)()
        assert list(caught.value.exceptions) == errors
        assert journal.count((method, "double")) == 3


async def test_later_errors_do_not_mask_the_first_error(ctxalchemy: ModuleType, db: Any, other_db: Any) -> None:
    first = LookupError("the commit")
    doubles = [SessionDouble([], commit=first), SessionDouble([], rollback=OSError("the rollback"))]
    async with ctxalchemy.new_ctx():
        for each, double in zip((db, other_db), doubles, strict=True):
            ctxalchemy.put_db_session_to_context(each, double)
        with pytest.raises(LookupError) as caught:
            await ctxalchemy.commit_all_sessions()
        assert caught.value is first
        assert "the rollback" in "".join(first.__notes__)


class SlowDouble(SessionDouble):
    """A double whose rollback waits at a gate."""

    def __init__(self, gate: Gate, **failures: Exception) -> None:
        super().__init__([], "slow", **failures)
        self._gate = gate

    async def rollback(self) -> None:
        await self._gate()
        await super().rollback()


async def _cancel_at(gate: Gate, completing: Any) -> asyncio.CancelledError:
    task = asyncio.create_task(completing)
    await gate.reached()
    task.cancel()
    # The rollback is shielded: it still waits at the gate after the cancellation.
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    return raised.value


async def test_cancellation_after_a_partial_commit_has_a_note_of_what_was_committed(
    ctxalchemy: ModuleType, db: Any, other_db: Any, third_db: Any
) -> None:
    gate = Gate()
    failure = ValueError("the second")
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, SessionDouble([], "first"))
        ctxalchemy.put_db_session_to_context(other_db, SessionDouble([], "second", commit=failure))
        ctxalchemy.put_db_session_to_context(third_db, SlowDouble(gate))
        cancelled = await _cancel_at(gate, ctxalchemy.commit_all_sessions())
    assert cancelled.__notes__ == [str(ctxalchemy.PartialCommitError([db], [other_db, third_db]))]
    assert cancelled.__context__ is failure or not CANCELLATIONS_HAVE_CONTEXT


async def test_cancellation_between_failed_rollbacks_has_a_note_of_each_failure(
    ctxalchemy: ModuleType, db: Any, other_db: Any
) -> None:
    gate = Gate()
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, SessionDouble([], "first", rollback=ValueError("the first")))
        ctxalchemy.put_db_session_to_context(other_db, SlowDouble(gate, rollback=ValueError("the second")))
        cancelled = await _cancel_at(gate, ctxalchemy.rollback_all_sessions())
    assert cancelled.__notes__ == [
        f"while sessions were being rolled back: ValueError: {which}" for which in ("the first", "the second")
    ]
