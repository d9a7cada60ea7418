"""Many threads, each with its own event loop, use contexts and databases concurrently, with and without the GIL."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.schema import Schema, add_note, checked_out, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import ModuleType

THREADS = 8
WITHOUT_GIL = getattr(sys.flags, "gil", None) == 0
GREENLET_IS_SAFE = not WITHOUT_GIL or sys.version_info >= (3, 14)


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """With the GIL, switch between threads a thousand times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """Run this in many threads at the same time, each with its own event loop."""
    barrier = threading.Barrier(THREADS)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            asyncio.run(work(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise BaseExceptionGroup("threads failed", errors)


class Session:
    """Stands for a session in a context."""

    def __init__(self, owner: tuple[int, int]) -> None:
        self.owner = owner


def test_imports_do_not_enable_the_gil(ctxalchemy: ModuleType) -> None:
    """If the GIL is disabled, no import has enabled it again."""
    if not WITHOUT_GIL:
        pytest.skip("this Python runs with the GIL")
    assert ctxalchemy is not None
    assert not getattr(sys, "_is_gil_enabled")()  # noqa: B009 - older type stubs do not have it


def test_contexts_of_many_threads_are_separate(ctxalchemy: ModuleType) -> None:
    """All tasks share the databases.  Each task has its own contexts and sessions."""
    backend = ctxalchemy._backend
    databases = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(5)]

    async def task(number: int, turn: int) -> None:
        store = backend.open_context()
        assert backend.current_context() is store
        mine = [Session((number, turn)) for _ in databases]
        for db, session in zip(databases, mine, strict=True):
            ctxalchemy.put_db_session_to_context(db, session)
            await asyncio.sleep(0)
        for db, session in zip(databases, mine, strict=True):
            assert await ctxalchemy.db_session(db) is session
            assert ctxalchemy.db_session_nowait(db) is session
        assert store.pop(databases[2]) is mine[2]
        inner = backend.open_context()
        with pytest.raises(StopIteration) as stopped:
            ctxalchemy.db_session(databases[0]).send(None)
        assert stopped.value.value is not mine[0]
        inner.close()
        backend.reset_context(inner)
        assert [session for _, session in store.close()] == [*mine[:2], *mine[3:]]
        with pytest.raises(ctxalchemy.ContextClosedError):
            await ctxalchemy.db_session(databases[0])
        backend.reset_context(store)
        assert backend.current_context() is None

    async def work(number: int) -> None:
        for turn in range(0, 200, 10):
            await asyncio.gather(*(task(number, turn + each) for each in range(10)))

    in_threads(work)


def test_context_that_threads_share_stays_consistent(ctxalchemy: ModuleType) -> None:
    """No session is lost, duplicated or mixed up if several threads call ``put``, ``get`` and ``pop`` concurrently."""
    if ctxalchemy.BACKEND == "python":
        pytest.skip(
            "in pure Python, threads that share a context may look up sessions in it, but not change it concurrently"
        )
    backend = ctxalchemy._backend
    shared = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(3)]
    store = backend.SessionStore()
    closed = backend.SessionStore()
    returned: list[Any] = []

    async def work(number: int) -> None:
        own = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")
        for turn in range(300):
            session = Session((number, turn))
            store.put(own, session)
            assert store.get(own) is session
            db = shared[turn % len(shared)]
            store.put(db, (db, session))
            found = store.get(db)
            assert found is None or found[0] is db
            found = store.pop(db)
            assert found is None or found[0] is db
            assert all(each[0] is key for key, each in store.items() if key in shared)
            assert 1 <= len(store) <= THREADS + len(shared)
            assert store.pop(own) is session
            try:
                closed.put(own, session)
            except ctxalchemy.ContextClosedError:
                assert closed.closed
            if (number, turn) == (0, 150):
                returned.extend(closed.close())

    in_threads(work)
    assert len(store) == 0
    assert len(returned) <= THREADS
    assert closed.items() == []


async def test_database_can_be_used_in_many_event_loops_at_once(ctxalchemy: ModuleType, schema: Schema) -> None:
    """Each event loop has its own engine, which is closed with the loop and does not affect the other engines."""
    if not GREENLET_IS_SAFE:
        pytest.skip("greenlet, which SQLAlchemy uses, crashes without the GIL before Python 3.14")
    rounds, tasks = 4, 3
    async with watched(schema.db(ctxalchemy, pool_size=tasks)) as db:
        loops = set[int]()
        lock = threading.Lock()
        all_have_engines = threading.Barrier(THREADS)

        async def request(name: str) -> None:
            async with ctxalchemy.new_ctx():
                session = await ctxalchemy.db_session(db)
                assert ctxalchemy.db_session_nowait(db) is session
                await add_note(session, name)

        async def work(number: int) -> None:
            with lock:
                loops.add(id((await db.session_maker()).kw["bind"]))
            for turn in range(rounds):
                await asyncio.gather(*(request(f"{number} {turn} {each}") for each in range(tasks)))
            assert await checked_out(db) == 0
            # All loops have their engines now.  The first thread closes the engines of all loops.
            await asyncio.to_thread(all_have_engines.wait)
            if number == 0:
                await db.close()
            await asyncio.sleep(0.2)
            await request(f"{number} after the closing")
            await asyncio.to_thread(all_have_engines.wait)
            await (await db.session_maker()).kw["bind"].dispose()

        await asyncio.to_thread(in_threads, work)
        assert len(loops) == THREADS
        expected = {f"{n} {turn} {each}" for n in range(THREADS) for turn in range(rounds) for each in range(tasks)}
        expected |= {f"{number} after the closing" for number in range(THREADS)}
        assert set(await schema.notes()) == expected
        assert await schema.has_no_open_transaction()
