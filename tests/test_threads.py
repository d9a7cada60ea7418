"""Many threads, each with its own event loop, use contexts and databases concurrently, with and without the GIL."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool
from support.schema import Schema, add_note, checked_out, watched
from support.sessions import maker_creator
from support.waiting import eventually

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


def test_closed_contexts_keep_no_database_alive(ctxalchemy: ModuleType) -> None:
    """Without the GIL, a thread keeps a reference to the database for its next call, as long as its context is open."""

    def use() -> weakref.ref[Any]:
        db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")

        async def work(number: int) -> None:
            store = ctxalchemy._backend.open_context()
            ctxalchemy.put_db_session_to_context(db, Session((number, 0)))
            for _ in range(3):
                await ctxalchemy.db_session(db)
            ctxalchemy._backend.reset_context(store)
            (store.close, store.clear, store.__init__, lambda: store.pop(db), lambda: None)[number % 5]()

        in_threads(work)
        return weakref.ref(db)

    gone = use()
    gc.collect()
    gc.collect()
    assert gone() is None


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


async def test_threads_that_share_a_database_lose_no_engine_and_mix_up_no_session(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """Each thread opens contexts, changes the host, and closes the database, while the other threads do the same."""
    if not GREENLET_IS_SAFE:
        pytest.skip("greenlet, which SQLAlchemy uses, crashes without the GIL before Python 3.14")
    hosts, rounds, tasks = ("127.0.0.1", "localhost"), 8, 3
    engines: list[AsyncEngine] = []
    # The context that each session belongs to.  The sessions stay alive, so that no two of them are equal.
    owners: dict[Any, tuple[int, int, int]] = {}
    committed: set[str] = set()
    # All threads have closed the database, and their event loops, which would close connections too, still run.
    finished = threading.Barrier(THREADS + 1, timeout=30)

    def create_engine(host: str) -> AsyncEngine:
        url = make_url(schema.url).set(host=host)
        engine = create_async_engine(url, pool_size=tasks, max_overflow=0, connect_args=schema.connect_args(f"@{host}"))
        engines.append(engine)
        return engine

    db = ctxalchemy.DBConnect(create_engine, maker_creator(), hosts[0])

    async def work(number: int) -> None:
        choices = random.Random(number)
        for turn in range(rounds):
            outcomes = [choices.choice(("commit", "roll back", "reset", "no statement")) for _ in range(tasks)]
            requests = [request((number, turn, each), outcome) for each, outcome in enumerate(outcomes)]
            if number % 2 == 0:
                requests.append(db.change_host(choices.choice(hosts)))
            await asyncio.gather(*requests)
            # Only this thread uses the connections of its event loop, and none is checked out now.
            if choices.random() < 0.3:
                await db.close()
        await db.close()
        for _ in range(2):
            await asyncio.to_thread(finished.wait)

    async def request(owner: tuple[int, int, int], outcome: str) -> None:
        name = " ".join(map(str, owner))
        if outcome == "reset":
            token = ctxalchemy.init_db_session_ctx()
            session = await use(owner, name)
            await ctxalchemy.reset_db_session_ctx(token)
        else:
            async with ctxalchemy.new_ctx():
                session = await use(owner, None if outcome == "no statement" else name)
                if outcome == "roll back":
                    await session.rollback()
        assert not session.in_transaction()
        if outcome == "commit":
            committed.add(name)

    async def use(owner: tuple[int, int, int], name: str | None) -> Any:
        sessions = await asyncio.gather(*(ctxalchemy.db_session(db) for _ in range(2)))
        session = sessions[0]
        assert owners.setdefault(session, owner) == owner
        for turn in range(50):
            assert await ctxalchemy.db_session(db) is session
            if turn % 10 == 0:
                await asyncio.sleep(0)
        assert sessions[1] is session
        if name is not None:
            await add_note(session, name)
            host = await session.scalar(text("SELECT current_setting('application_name')"))
            assert host == f"{schema.name}@{session.bind.url.host}"
            assert await ctxalchemy.run_in_new_ctx(other_session) is not session
        return session

    async def other_session() -> Any:
        session = await ctxalchemy.db_session(db)
        assert session not in owners
        return session

    async def all_closed() -> bool:
        return await schema.backends() == []

    threads = asyncio.create_task(asyncio.to_thread(in_threads, work))
    try:
        await asyncio.to_thread(finished.wait)
        assert await eventually(all_closed), await schema.activity()
        assert list(db._engines) == []
        assert {f"@{engine.url.host}" for engine in engines} == {f"@{host}" for host in hosts}
        assert {engine.pool.checkedout() for engine in engines if isinstance(engine.pool, QueuePool)} == {0}
        await asyncio.to_thread(finished.wait)
    finally:
        await threads
    assert set(await schema.notes()) == committed
    assert len(set(owners.values())) == len(owners) == THREADS * rounds * tasks
    async with watched(db):
        await db.connect(hosts[1])
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "afterwards")
