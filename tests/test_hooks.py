"""Callbacks of ``on_commit`` and ``on_rollback`` run once, after their transaction was committed or rolled back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock
from weakref import ref

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from support.apps import Answer, Kind, Message, build, call, each_kind
from support.schema import Schema, add_note, break_commit, checked_out, count_notes
from support.sessions import Note, OverriddenSession, SessionDouble, maker_creator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import ModuleType

    from sqlalchemy.orm import Session


class Calls(list[str]):
    """The callbacks that were called, in order."""

    def of(self, name: str) -> Callable[[], None]:
        return partial(self.append, name)

    def register(self, ctxalchemy: ModuleType, db: Any, name: str = "") -> None:
        """Register one callback of each kind."""
        ctxalchemy.on_commit(db, self.of(f"committed {name}".strip()))
        ctxalchemy.on_rollback(db, self.of(f"rolled back {name}".strip()))


async def begin(ctxalchemy: ModuleType, db: Any, calls: Calls) -> AsyncSession:
    session: AsyncSession = await ctxalchemy.db_session(db)
    await add_note(session, "written")
    calls.register(ctxalchemy, db)
    return session


async def register_and_fail(ctxalchemy: ModuleType, db: Any, calls: Calls, block: Callable[[], Any]) -> None:
    async with block():
        calls.register(ctxalchemy, db)
        raise LookupError("in the block")


# --- what ends the transaction -----------------------------------------------------------------------

COMMITS: dict[str, Callable[[ModuleType, Any], Awaitable[None]]] = {
    "commit_db_session": lambda ctxalchemy, db: ctxalchemy.commit_db_session(db),
    "commit_all_sessions": lambda ctxalchemy, _: ctxalchemy.commit_all_sessions(),
    "auto_commit_by_status_code": lambda ctxalchemy, _: ctxalchemy.auto_commit_by_status_code(200),
    "session.commit": lambda ctxalchemy, db: ctxalchemy.db_session_nowait(db).commit(),
    "run_sync": lambda ctxalchemy, db: ctxalchemy.db_session_nowait(db).run_sync(lambda session: session.commit()),
}
ROLLBACKS: dict[str, Callable[[ModuleType, Any], Awaitable[None]]] = {
    "rollback_db_session": lambda ctxalchemy, db: ctxalchemy.rollback_db_session(db),
    "rollback_all_sessions": lambda ctxalchemy, _: ctxalchemy.rollback_all_sessions(),
    "auto_commit_by_status_code": lambda ctxalchemy, _: ctxalchemy.auto_commit_by_status_code(404),
    "close_db_session": lambda ctxalchemy, db: ctxalchemy.close_db_session(db),
    "close_all_sessions": lambda ctxalchemy, _: ctxalchemy.close_all_sessions(),
    "session.rollback": lambda ctxalchemy, db: ctxalchemy.db_session_nowait(db).rollback(),
    "session.close": lambda ctxalchemy, db: ctxalchemy.db_session_nowait(db).close(),
    "session.invalidate": lambda ctxalchemy, db: ctxalchemy.db_session_nowait(db).invalidate(),
}


@pytest.mark.parametrize("how", COMMITS)
async def test_callback_runs_once_by_the_time_the_commit_returns(
    ctxalchemy: ModuleType, schema: Schema, db: Any, how: str
) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        await begin(ctxalchemy, db, calls)
        assert calls == []
        await COMMITS[how](ctxalchemy, db)
        assert calls == ["committed"]
        await add_note(await ctxalchemy.db_session(db), "another transaction")
    assert calls == ["committed"]
    assert await schema.notes() == ["another transaction", "written"]


@pytest.mark.parametrize("how", ROLLBACKS)
async def test_callback_runs_once_by_the_time_the_rollback_returns(
    ctxalchemy: ModuleType, schema: Schema, db: Any, how: str
) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        await begin(ctxalchemy, db, calls)
        await ROLLBACKS[how](ctxalchemy, db)
        assert calls == ["rolled back"]
        await add_note(await ctxalchemy.db_session(db), "another transaction")
    assert calls == ["rolled back"]
    assert await schema.notes() == ["another transaction"]


async def test_callback_runs_when_a_block_of_the_application_ends(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        async with session.begin():
            calls.register(ctxalchemy, db, "begin()")
        async with ctxalchemy.atomic_db_session(db):
            calls.register(ctxalchemy, db, "atomic")
        for block in (session.begin, partial(ctxalchemy.atomic_db_session, db)):
            with pytest.raises(LookupError):
                await register_and_fail(ctxalchemy, db, calls, block)
            assert calls[-1] == "rolled back"
            calls.append("then")
        calls.register(ctxalchemy, db, "before")
        async with ctxalchemy.atomic_db_session(db, "rollback"):
            assert calls[-1] == "rolled back before"
            calls.register(ctxalchemy, db, "appended")
            async with ctxalchemy.atomic_db_session(db, "append"):
                pass
            assert calls[-1] == "committed appended"
    assert calls == [
        *("committed begin()", "committed atomic", "rolled back", "then", "rolled back", "then"),
        *("rolled back before", "committed appended"),
    ]


async def test_callback_runs_when_the_context_ends(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        await begin(ctxalchemy, db, calls)
    assert calls == ["committed"]
    with pytest.raises(LookupError):
        await register_and_fail(ctxalchemy, db, calls, ctxalchemy.new_ctx)
    assert calls == ["committed", "rolled back"]
    token = ctxalchemy.init_db_session_ctx()
    calls.register(ctxalchemy, db, "by reset")
    await ctxalchemy.reset_db_session_ctx(token)
    assert calls == ["committed", "rolled back", "rolled back by reset"]

    async def work() -> None:
        calls.register(ctxalchemy, db, "in a context of its own")

    async with ctxalchemy.new_ctx():
        calls.register(ctxalchemy, db, "outside")
        await ctxalchemy.run_in_new_ctx(work)
        assert calls[-1] == "committed in a context of its own"
    assert calls[-1] == "committed outside"


async def test_reset_runs_the_callbacks_of_all_nested_contexts(ctxalchemy: ModuleType, db: Any, other_db: Any) -> None:
    calls = Calls()
    token = ctxalchemy.init_db_session_ctx()
    calls.register(ctxalchemy, db, "outer")
    ctxalchemy.init_db_session_ctx(force=True)
    calls.register(ctxalchemy, other_db, "inner")
    await ctxalchemy.reset_db_session_ctx(token)
    assert sorted(calls) == ["rolled back inner", "rolled back outer"]


async def test_failed_commit_runs_on_rollback(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        for commit in (
            ctxalchemy.commit_all_sessions,
            partial(ctxalchemy.commit_db_session, db),
            partial(COMMITS["session.commit"], ctxalchemy, db),
        ):
            session = await begin(ctxalchemy, db, calls)
            await break_commit(session)
            with pytest.raises(IntegrityError):
                await commit()
            # After a failed commit of its own, the application must roll back.
            await session.rollback()
            assert calls == ["rolled back"]
            calls.clear()
    assert await schema.notes() == []


async def test_session_that_was_taken_out_of_its_context_keeps_its_callbacks(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        session = await begin(ctxalchemy, db, calls)
        assert ctxalchemy.pop_db_session_from_context(db) is session
    assert calls == []
    await session.commit()
    assert calls == ["committed"]
    await session.close()

    token = ctxalchemy.init_db_session_ctx()
    calls.register(ctxalchemy, db, "after the reset")
    session = ctxalchemy.db_session_nowait(db)
    await ctxalchemy.reset_db_session_ctx(token, with_close=False)
    await session.close()
    assert calls == ["committed", "rolled back after the reset"]


async def test_methods_that_a_subclass_overrides_run_the_callbacks(ctxalchemy: ModuleType, schema: Schema) -> None:
    plain = schema.db(ctxalchemy)
    db = ctxalchemy.DBConnect(
        plain.engine_creator, maker_creator(class_=OverriddenSession, info={"journal": []}), plain.host
    )
    calls = Calls()
    for commit in (ctxalchemy.commit_all_sessions, partial(COMMITS["session.commit"], ctxalchemy, db)):
        async with ctxalchemy.new_ctx():
            calls.register(ctxalchemy, db)
            await commit()
            assert calls.pop() == "committed"
    await db.close()


# --- when and in which order -------------------------------------------------------------------------


async def test_callbacks_run_in_the_order_of_registration_after_all_commits(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    calls = Calls()

    async def check(name: str) -> None:
        assert await schema.notes() == ["first", "second"]
        assert await checked_out(db) == await checked_out(other_db) == 0
        calls.append(name)

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "first")
        await add_note(await ctxalchemy.db_session(other_db), "second")
        for number, each in enumerate((other_db, db, db, other_db)):
            ctxalchemy.on_commit(each, partial(check, str(number)))
        ctxalchemy.on_commit(db, calls.of("not async"))
    assert calls == ["0", "1", "2", "3", "not async"]


async def test_callback_that_a_flush_registers_runs(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    """The first callback of a context may be registered in the middle of its commit, even in a savepoint."""
    calls = Calls()
    failure = LookupError("of the callback")

    def fail() -> None:
        calls.append("called")
        raise failure

    def register(session: Session, _: object) -> None:
        with session.begin_nested():
            ctxalchemy.on_commit(db, fail)

    for commit in (ctxalchemy.commit_all_sessions, partial(COMMITS["session.commit"], ctxalchemy, db)):
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            event.listen(session.sync_session, "after_flush", register)
            session.add(Note(name=f"after {len(calls)}"))
            with pytest.raises(LookupError):
                await commit()
            assert await checked_out(db) == 0
    assert calls == ["called", "called"]
    assert await schema.notes() == ["after 0", "after 1"]
    assert await schema.backends() == ["idle"]


@pytest.mark.parametrize("savepoints", ["s", "S", "st", "sT", "St", "ST"])
@pytest.mark.parametrize("outer", ["committed", "rolled back"])
async def test_callbacks_of_a_savepoint_share_its_outcome(
    ctxalchemy: ModuleType, db: Any, savepoints: str, outer: str
) -> None:
    """The nested savepoints have one letter each, a capital letter if they are rolled back."""
    calls = Calls()

    async def run(names: str) -> None:
        if names:
            session = await ctxalchemy.db_session(db)
            savepoint = await session.begin_nested()
            calls.register(ctxalchemy, db, names[0])
            await run(names[1:])
            await (savepoint.rollback() if names[0].isupper() else savepoint.commit())

    async with ctxalchemy.new_ctx():
        calls.register(ctxalchemy, db, "outside")
        await run(savepoints)
        assert calls == []
        await (ctxalchemy.commit_db_session(db) if outer == "committed" else ctxalchemy.rollback_db_session(db))
        undone = False
        expected = [f"{outer} outside"]
        for name in savepoints:
            undone = undone or name.isupper()
            expected.append(f"{'rolled back' if undone else outer} {name}")
        assert calls == expected


async def test_rollback_of_the_transaction_ends_its_savepoints(ctxalchemy: ModuleType, db: Any) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        for end, expected in ((session.rollback, "rolled back"), (session.commit, "committed")):
            calls.register(ctxalchemy, db)
            await session.begin_nested()
            calls.register(ctxalchemy, db, "inside")
            await end()
            assert calls == [expected, f"{expected} inside"]
            calls.clear()


# --- registering -------------------------------------------------------------------------------------


async def test_registering_begins_a_transaction_without_io(ctxalchemy: ModuleType, db: Any) -> None:
    calls = Calls()
    async with ctxalchemy.new_ctx():
        calls.register(ctxalchemy, db)
        session = ctxalchemy.get_db_session_from_context(db)
        assert session is not None
        assert session.in_transaction()
        assert await checked_out(db) == 0
    assert calls == ["committed"]


@pytest.mark.parametrize("name", ["on_commit", "on_rollback"])
async def test_registering_without_an_open_context_is_an_error(ctxalchemy: ModuleType, db: Any, name: str) -> None:
    register = getattr(ctxalchemy, name)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        register(db, print)
    closed = asyncio.Event()

    async def outlive() -> None:
        await closed.wait()
        register(db, print)

    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(outlive())
        await asyncio.sleep(0)
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await task


async def test_registering_cannot_wait_for_a_session(ctxalchemy: ModuleType, schema: Schema) -> None:
    db = schema.db(ctxalchemy, before_create_session_handler=AsyncMock())
    calls = Calls()
    async with ctxalchemy.new_ctx():
        with pytest.raises(ctxalchemy.SessionNotReadyError):
            calls.register(ctxalchemy, db)
        await ctxalchemy.db_session(db)
        calls.register(ctxalchemy, db)
    assert calls == ["committed"]
    await db.close()


async def test_wrong_arguments_are_refused_by_their_type(ctxalchemy: ModuleType, db: Any) -> None:
    async def callback() -> None: ...

    coroutine = callback()
    async with ctxalchemy.new_ctx():
        with pytest.raises(TypeError, match=r"^on_commit\(\) takes a function without arguments, got str: pass"):
            ctxalchemy.on_commit(db, "secret")
        with pytest.raises(TypeError, match=r"^on_rollback\(\) .* got coroutine: .* without calling it$"):
            ctxalchemy.on_rollback(db, coroutine)
        with pytest.raises(TypeError, match="expected a DBConnect, got str"):
            ctxalchemy.on_commit("secret", callback)
        assert ctxalchemy.get_db_session_from_context(db) is None
        for double in (SessionDouble([]), AsyncMock(AsyncSession)):
            ctxalchemy.put_db_session_to_context(db, double)
            with pytest.raises(TypeError, match=f"AsyncSession: .* of the class {type(double).__name__}$"):
                ctxalchemy.on_commit(db, callback)
            ctxalchemy.pop_db_session_from_context(db)
    coroutine.close()


async def test_context_without_callbacks_has_no_listeners(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "written")
        await ctxalchemy.commit_all_sessions()
        dispatch = session.sync_session.dispatch
        assert not list(dispatch.after_commit)
        assert not list(dispatch.after_transaction_end)
        store = ctxalchemy._backend.current_context()
        assert ref(store) not in ctxalchemy._complete.callbacks
        ctxalchemy.on_commit(db, print)
        ctxalchemy.on_commit(db, print)
        assert len(list(dispatch.after_transaction_end)) == 1
        assert ref(store) in ctxalchemy._complete.callbacks


# --- what a callback may do --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["new_ctx", "session.commit", "commit_db_session"])
async def test_callback_may_use_the_session(ctxalchemy: ModuleType, schema: Schema, db: Any, how: str) -> None:
    """Its transaction is completed when it returns, so that no connection is checked out during the next callback."""
    calls = Calls()

    async def write(name: str) -> None:
        assert await checked_out(db) == 0
        await add_note(await ctxalchemy.db_session(db), name)
        calls.register(ctxalchemy, db, name)

    async def fail(name: str) -> None:
        await write(name)
        raise LookupError(name)

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "request")
        for callback in (partial(write, "first"), partial(fail, "fails"), partial(write, "last")):
            ctxalchemy.on_commit(db, callback)
        if how != "new_ctx":
            await COMMITS[how](ctxalchemy, db)

    with pytest.raises(LookupError, match="fails") as raised:
        await ctxalchemy.run_in_new_ctx(work)
    assert calls == ["committed first", "rolled back fails", "committed last"]
    assert raised.value.__notes__[0].endswith("after its transaction was committed")
    assert await schema.notes() == ["first", "last", "request"]


async def test_callback_does_not_complete_the_transactions_of_others(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "first")
        await add_note(await ctxalchemy.db_session(other_db), "second")

    async with ctxalchemy.new_ctx():
        other = await ctxalchemy.db_session(other_db)
        await add_note(other, "other")
        ctxalchemy.on_commit(db, write)
        await ctxalchemy.commit_db_session(db)
        assert await schema.notes() == ["first"]
        assert other.in_transaction()
        await ctxalchemy.rollback_db_session(other_db)
    assert await schema.notes() == ["first"]


async def test_callback_may_use_the_session_of_a_begin_block(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "callback")

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        async with session.begin():
            await add_note(session, "block")
            ctxalchemy.on_commit(db, write)
        assert await schema.notes() == ["block", "callback"]
        async with session.begin():
            await add_note(session, "another block")
    assert await schema.notes() == ["another block", "block", "callback"]


async def test_before_commit_is_called_for_what_a_callback_begins(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def before_commit(session: AsyncSession) -> None:
        await add_note(session, f"hook {await count_notes(session)}")

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "callback")

    async def endpoint() -> Answer:
        ctxalchemy.on_commit(db, write)
        return Answer()

    await call(build("asgi", ctxalchemy, endpoint, before_commit=before_commit))
    assert await schema.notes() == ["callback", "hook 0", "hook 2"]


async def test_several_failures_are_raised_as_a_group_after_all_have_run(ctxalchemy: ModuleType, db: Any) -> None:
    calls = Calls()

    async def fail(error: Exception) -> None:
        raise error

    errors = [LookupError("first"), ValueError("second")]
    async with ctxalchemy.new_ctx():
        for error in errors:
            ctxalchemy.on_commit(db, partial(fail, error))
        ctxalchemy.on_commit(db, calls.of("last"))
        with pytest.raises(ExceptionGroup) as raised:
            await ctxalchemy.commit_db_session(db)
    assert list(raised.value.exceptions) == errors
    assert all(error.__notes__[0].endswith("after its transaction was committed") for error in errors)
    assert calls == ["last"]


async def test_failure_of_on_rollback_does_not_mask_the_first_error(ctxalchemy: ModuleType, db: Any) -> None:
    def fail() -> None:
        raise ValueError("later")

    calls = Calls()
    async with ctxalchemy.new_ctx():
        ctxalchemy.on_rollback(db, fail)
        block = partial(ctxalchemy.atomic_db_session, db, "append")
        with pytest.raises(LookupError, match="in the block") as raised:
            await register_and_fail(ctxalchemy, db, calls, block)
    assert raised.value.__notes__ == ["then callback failed: ValueError: later"]
    assert calls == ["rolled back"]


BLOCKS: dict[str, Any] = {"session.begin()": lambda session: session.begin(), "session": lambda session: session}


@pytest.mark.parametrize("is_caught", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
async def test_failure_of_on_rollback_does_not_mask_the_error_that_ends_a_block_of_sqlalchemy(
    ctxalchemy: ModuleType, db: Any, block: str, is_caught: bool
) -> None:
    """The failure is raised at the end of the context, or becomes a note of the error that ends the context."""

    def fail() -> None:
        raise ValueError("later")

    async def run() -> None:
        async with ctxalchemy.new_ctx():
            with pytest.raises(LookupError, match="in the block") as raised:
                await fail_in_block(ctxalchemy, db, BLOCKS[block], fail)
            if not is_caught:
                raise raised.value

    with pytest.raises(ValueError if is_caught else LookupError) as raised:
        await run()
    if not is_caught:
        assert raised.value.__notes__ == ["earlier, a callback failed: ValueError: later"]


async def fail_in_block(ctxalchemy: ModuleType, db: Any, block: Any, callback: Any) -> None:
    async with block(await ctxalchemy.db_session(db)):
        ctxalchemy.on_rollback(db, callback)
        raise LookupError("in the block")


# --- requests and tests ------------------------------------------------------------------------------


@each_kind
async def test_callbacks_run_between_the_commit_and_the_response_start(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    calls = Calls()

    async def notify() -> None:
        calls.append(f"committed {await schema.notes()}")

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "background")
        ctxalchemy.on_commit(db, notify)

    async def stream() -> AsyncIterator[bytes]:
        yield b"part"
        calls.register(ctxalchemy, db, "stream")
        yield b"part"

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "handler")
        ctxalchemy.on_commit(db, notify)
        return Answer(stream=stream(), background=background)

    async def on_message(message: Message) -> None:
        calls.append(message["type"].removeprefix("http.response."))

    await call(build(kind, ctxalchemy, endpoint), on_message)
    assert calls[:2] == ["committed ['handler']", "start"]
    assert calls[-2:] == ["committed stream", "committed ['background', 'handler']"]


@pytest.mark.parametrize("status", [404, None])
async def test_on_rollback_runs_if_the_request_fails(
    ctxalchemy: ModuleType, schema: Schema, db: Any, status: int | None
) -> None:
    calls = Calls()

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "audit")
        calls.append("audited")

    async def endpoint() -> Answer:
        await begin(ctxalchemy, db, calls)
        ctxalchemy.on_rollback(db, write)
        if status is None:
            raise LookupError
        return Answer(status)

    async def on_message(message: Message) -> None:
        calls.append(message["type"])

    try:
        await call(build("asgi", ctxalchemy, endpoint), on_message)
    except LookupError:
        calls.append("raised")
    assert calls[:3] == ["rolled back", "audited", "raised" if status is None else "http.response.start"]
    assert await schema.notes() == ["audit"]


async def test_test_contexts_run_callbacks_as_production_does(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    calls = Calls()
    testing = ctxalchemy.testing

    async def endpoint() -> Answer:
        await begin(ctxalchemy, db, calls)
        await ctxalchemy.commit_db_session(db)
        return Answer()

    async with testing.rollback_session(db) as session, testing.set_test_context():
        async with testing.put_savepoint_session_in_ctx(db, session):
            await call(build("asgi", ctxalchemy, endpoint))
            assert calls == ["committed"]
            calls.register(ctxalchemy, db, "left open")
        assert calls == ["committed", "rolled back left open"]
    async with testing.set_test_context(auto_close=True):
        calls.register(ctxalchemy, db, "auto_close")
    assert calls[2:] == ["committed auto_close"]
    assert await schema.notes() == []
