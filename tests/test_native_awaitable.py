"""``db_session()`` returns an object that behaves as the coroutine of an ``async def``, even in unusual uses.

The tests run on both backends: the native coroutine must behave as that of the ``async def`` in Python does.
"""

from __future__ import annotations

import asyncio
import copy
import cProfile
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import types
import typing
import warnings
import weakref
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

import pytest
from support.interpreter import OPTIONS, needs_reference_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import ModuleType


class Thing:
    """Stands for a database or a session in tests that need neither."""


@pytest.fixture
def key() -> Thing:
    return Thing()


@pytest.fixture
def session() -> Thing:
    return Thing()


@pytest.fixture
def store(ctxalchemy: ModuleType, key: Thing, session: Thing) -> Iterator[Any]:
    """An open context with one session, current in the test."""
    store = ctxalchemy._backend.open_context()
    store.put(key, session)
    yield store
    store.close()
    ctxalchemy._backend.reset_context(store)


@pytest.fixture
def shared_store(ctxalchemy: ModuleType, key: Thing, session: Thing) -> Iterator[Any]:
    """The same, opened without an event loop: it belongs to no thread yet."""
    ctxalchemy.init_db_session_ctx()
    store = ctxalchemy._backend.current_context()
    store.put(key, session)
    yield store
    store.close()
    ctxalchemy._backend.reset_context(store)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that does not wait."""
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    return stopped.value.value


async def awaited(awaitable: Any) -> Any:
    return await awaitable


def waiting_db(ctxalchemy: ModuleType, event: asyncio.Event) -> Any:
    """Return a database whose sessions are created only after the event is set."""

    async def handler(_database: Any) -> None:
        await event.wait()

    return ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", before_create_session_handler=handler)


def never_ready_db(ctxalchemy: ModuleType, finished: list[bool]) -> Any:
    """Return a database whose handler never returns.  ``finished`` gets an item when the handler is ended."""

    async def handler(_database: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            finished.append(True)

    return ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", before_create_session_handler=handler)


@contextmanager
def context(ctxalchemy: ModuleType) -> Iterator[Any]:
    store = ctxalchemy._backend.open_context()
    try:
        yield store
    finally:
        store.close()
        ctxalchemy._backend.reset_context(store)


# The function


@pytest.mark.parametrize("name", ["db_session", "db_session_nowait", "init_db_session_ctx", "is_context_initiated"])
def test_function_is_a_python_function_for_inspection(ctxalchemy: ModuleType, name: str) -> None:
    function = getattr(ctxalchemy, name)
    assert isinstance(function, types.FunctionType)
    assert inspect.isfunction(function)
    assert inspect.getsource(function).startswith(("async def", "def"))
    assert typing.get_type_hints(
        function, {"DBConnect": object, "AsyncSession": object, "SessionStore": object, "Token": list}
    )
    assert repr(function).startswith(f"<function {name} at 0x")
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.copy(function) is function
    assert weakref.ref(function)() is function


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((), {}), ((1, 2), {}), ((), {"connection": 1}), ((1,), {"connect": 1}), ((1,), {"more": 1})],
)
@pytest.mark.parametrize("name", ["db_session", "db_session_nowait"])
def test_wrong_arguments_raise_the_error_of_python(
    packages: dict[str, dict[str, ModuleType]], name: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    messages = set()
    for modules in packages.values():
        with pytest.raises(TypeError) as caught:
            getattr(modules["ctxalchemy"], name)(*arguments, **named)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert f"{name}() " in messages.pop()


def test_database_can_be_passed_by_position_or_by_name(
    ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing
) -> None:
    assert run(ctxalchemy.db_session(key)) is session
    assert run(ctxalchemy.db_session(connect=key)) is session
    assert run(ctxalchemy.db_session(*(key,))) is session
    assert run(ctxalchemy.db_session(connect=key)) is session
    assert ctxalchemy.db_session_nowait(connect=key) is session


# The coroutine


def test_coroutine_is_a_coroutine_for_inspection(ctxalchemy: ModuleType, store: Any, key: Thing) -> None:
    coroutine = ctxalchemy.db_session(key)
    assert inspect.iscoroutine(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED
    assert (coroutine.__name__, coroutine.__qualname__) == ("db_session", "db_session")
    assert coroutine.cr_code is ctxalchemy.db_session.__code__ or coroutine.cr_code.co_name == "db_session"
    assert repr(coroutine).startswith("<coroutine object db_session at 0x")
    assert weakref.ref(coroutine)() is coroutine
    run(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@needs_reference_counts
def test_coroutine_that_is_never_awaited_warns(ctxalchemy: ModuleType, key: Thing) -> None:
    for _ in range(3):
        with pytest.warns(RuntimeWarning, match="coroutine 'db_session' was never awaited") as warned:
            ctxalchemy.db_session(key)
        assert [each.filename for each in warned] == [__file__]


@needs_reference_counts
def test_warning_about_a_coroutine_never_awaited_can_be_turned_into_an_error(
    ctxalchemy: ModuleType, key: Thing, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", caught.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctxalchemy.db_session(key)
    [unraisable] = caught
    assert isinstance(unraisable.exc_value, RuntimeWarning)


@needs_reference_counts
def test_closed_coroutine_does_not_warn(ctxalchemy: ModuleType, key: Thing) -> None:
    coroutine = ctxalchemy.db_session(key)
    coroutine.close()
    coroutine.close()
    del coroutine
    gc.collect()


def test_first_send_accepts_only_none(ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing) -> None:
    coroutine = ctxalchemy.db_session(key)
    with pytest.raises(TypeError, match="can't send non-None value to a just-started coroutine"):
        coroutine.send(1)
    assert run(coroutine) is session


@pytest.mark.parametrize("how", ["send", "throw"])
def test_coroutine_cannot_be_reused_after_its_result(ctxalchemy: ModuleType, store: Any, key: Thing, how: str) -> None:
    coroutine = ctxalchemy.db_session(key)
    run(coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        getattr(coroutine, how)(None if how == "send" else ValueError())
    coroutine.close()


def test_coroutine_cannot_be_reused_after_its_exception(ctxalchemy: ModuleType, key: Thing) -> None:
    coroutine = ctxalchemy.db_session(key)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        coroutine.send(None)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


def test_throw_of_something_that_is_no_exception_does_not_change_the_coroutine(
    ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing
) -> None:
    coroutine = ctxalchemy.db_session(key)
    with pytest.raises(TypeError, match="exceptions must be classes or instances deriving from BaseException"):
        coroutine.throw(1)
    assert run(coroutine) is session


@pytest.mark.parametrize("thrown", [KeyError, KeyError("thrown"), GeneratorExit, asyncio.CancelledError()])
def test_exception_thrown_before_the_start_is_raised(
    ctxalchemy: ModuleType, store: Any, key: Thing, thrown: Any
) -> None:
    coroutine = ctxalchemy.db_session(key)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - which one is asserted below
        coroutine.throw(thrown)
    assert caught.value is thrown or caught.type is thrown
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


def test_lookup_uses_the_context_of_the_awaiting_code(
    ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing
) -> None:
    inside = ctxalchemy.db_session(key)
    assert copy_context().run(run, inside) is session
    outside = ctxalchemy.db_session(key)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        Context().run(outside.send, None)
    coroutine = Context().run(ctxalchemy.db_session, key)
    assert run(coroutine) is session


def test_session_is_looked_up_at_the_await_and_not_at_the_call(ctxalchemy: ModuleType, store: Any, key: Thing) -> None:
    coroutine = ctxalchemy.db_session(key)
    later = Thing()
    store.put(key, later)
    assert run(coroutine) is later


def test_result_that_is_a_tuple_or_an_exception_is_returned_unchanged(
    ctxalchemy: ModuleType, store: Any, key: Thing
) -> None:
    for result in ((1, 2), (), ValueError("a value"), StopIteration(3), StopIteration):
        store.put(key, result)
        assert run(ctxalchemy.db_session(key)) is result
        assert run(awaited(ctxalchemy.db_session(key))) is result
        with pytest.raises(StopIteration) as stopped:
            next(ctxalchemy.db_session(key).__await__())
        assert stopped.value.value is result


# While the coroutine waits


async def test_waiting_coroutine_is_suspended(ctxalchemy: ModuleType) -> None:
    event = asyncio.Event()
    db = waiting_db(ctxalchemy, event)
    with context(ctxalchemy):
        coroutine = ctxalchemy.db_session(db)
        future = coroutine.send(None)
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_SUSPENDED
        assert coroutine.cr_await is not None
        assert coroutine.cr_frame is not None
        with pytest.raises(RuntimeError, match="coroutine is being awaited already"):
            await coroutine
        event.set()
        await asyncio.sleep(0)
        assert future.done()
        session = run(coroutine)
        assert session is await ctxalchemy.db_session(db)
        assert coroutine.cr_await is None


async def test_exception_thrown_while_the_coroutine_waits_is_raised_and_ends_it(ctxalchemy: ModuleType) -> None:
    db = waiting_db(ctxalchemy, asyncio.Event())
    with context(ctxalchemy) as store:
        for thrown in (KeyError("thrown"), GeneratorExit("thrown"), asyncio.CancelledError("thrown")):
            coroutine = ctxalchemy.db_session(db)
            coroutine.send(None)
            with pytest.raises(type(thrown)) as caught:
                coroutine.throw(thrown)
            assert caught.value is thrown
            with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
                coroutine.send(None)
        assert store.get(db) is None


async def test_coroutine_can_be_closed_while_it_waits(ctxalchemy: ModuleType) -> None:
    finished: list[bool] = []
    with context(ctxalchemy):
        coroutine = ctxalchemy.db_session(never_ready_db(ctxalchemy, finished))
        coroutine.send(None)
        coroutine.close()
    assert finished == [True]


@needs_reference_counts
async def test_waiting_coroutine_is_closed_when_its_last_reference_is_dropped(ctxalchemy: ModuleType) -> None:
    finished: list[bool] = []
    with context(ctxalchemy):
        coroutine = ctxalchemy.db_session(never_ready_db(ctxalchemy, finished))
        coroutine.send(None)
        del coroutine
        gc.collect()
    assert finished == [True]


async def test_running_coroutine_cannot_be_resumed_or_closed_by_its_own_code(ctxalchemy: ModuleType) -> None:
    errors: list[str] = []

    async def handler(_database: Any) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: coroutine.send(None),
            lambda: coroutine.throw(KeyError),
            lambda: coroutine.close(),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="coroutine already executing") as caught:
                call()
            errors.append(str(caught.value))
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_RUNNING

    db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", before_create_session_handler=handler)
    with context(ctxalchemy):
        coroutine = ctxalchemy.db_session(db)
        session = run(coroutine)
        assert len(errors) == 3
        await session.close()


async def test_reference_cycle_through_a_waiting_coroutine_is_collected(ctxalchemy: ModuleType) -> None:
    db = waiting_db(ctxalchemy, asyncio.Event())
    with context(ctxalchemy):
        coroutine = ctxalchemy.db_session(db)
        coroutine.send(None)
        db.waited_for_by = coroutine
        gone = weakref.ref(db)
        del db, coroutine
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None


# Debuggers, tracers and profilers


def test_each_await_driven_by_next_raises_its_own_stop_iteration(
    ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing
) -> None:
    kept = []
    for _ in range(4):
        with pytest.raises(StopIteration) as stopped:
            next(ctxalchemy.db_session(key).__await__())
        assert stopped.value.value is session
        assert stopped.value.__context__ is None
        assert not hasattr(stopped.value, "__notes__")
        stopped.value.value = "changed"
        stopped.value.add_note("changed")
        kept.append(stopped.value)
    assert len(set(map(id, kept))) == 4
    del stopped  # pyright: ignore[reportPossiblyUnboundVariable]
    kept.clear()
    assert run(awaited(ctxalchemy.db_session(key))) is session


def test_tracebacks_do_not_accumulate_over_several_awaits(ctxalchemy: ModuleType, store: Any, key: Thing) -> None:
    def depth() -> int:
        with pytest.raises(StopIteration) as stopped:
            next(ctxalchemy.db_session(key).__await__())
        assert stopped.value.__context__ is None
        assert stopped.value.__cause__ is None
        return len(list(_tracebacks(stopped.value)))

    assert len({depth() for _ in range(20)}) == 1


def _tracebacks(error: BaseException) -> Iterator[types.TracebackType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _with_settrace(function: Callable[[], Any]) -> None:
    kept = []

    def trace(_frame: Any, event: str, argument: Any) -> Any:
        if event == "exception":
            kept.append(argument)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    assert len({id(each[1]) for each in kept}) == len(kept)


def _with_monitoring(function: Callable[[], Any]) -> None:
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is None:
        pytest.skip("new in 3.12")
    kept: list[Any] = []
    events = monitoring.events.RAISE | monitoring.events.STOP_ITERATION
    monitoring.use_tool_id(4, "test")
    try:
        for event in (monitoring.events.RAISE, monitoring.events.STOP_ITERATION):
            monitoring.register_callback(4, event, lambda _code, _offset, error: kept.append(error))
        monitoring.set_events(4, events)
        function()
        monitoring.set_events(4, 0)
    finally:
        monitoring.free_tool_id(4)
    assert len(set(map(id, kept))) == len(kept)


def _with_profiler(function: Callable[[], Any]) -> None:
    profiler = cProfile.Profile()
    try:
        profiler.enable()
    except ValueError:
        pytest.skip("another profiler is active")
    try:
        function()
    finally:
        profiler.disable()


@pytest.mark.parametrize("observer", [_with_settrace, _with_monitoring, _with_profiler])
def test_await_works_under_a_tracer_a_monitor_and_a_profiler(
    ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing, observer: Callable[[Callable[[], Any]], None]
) -> None:
    async def several() -> list[Any]:
        return [await ctxalchemy.db_session(key) for _ in range(5)]

    found: list[Any] = []
    observer(lambda: found.extend(run(several())))
    assert found == [session] * 5
    assert run(several()) == [session] * 5


def test_generator_can_yield_from_the_coroutine(ctxalchemy: ModuleType, store: Any, key: Thing, session: Thing) -> None:
    @types.coroutine
    def generator() -> Any:
        return (yield from ctxalchemy.db_session(key))

    assert run(awaited(generator())) is session


# Memory


def test_await_keeps_no_reference_to_the_session(ctxalchemy: ModuleType, key: Thing) -> None:
    with context(ctxalchemy) as store:
        session = Thing()
        store.put(key, session)
        for _ in range(3):
            assert run(awaited(ctxalchemy.db_session(key))) is session
            assert run(ctxalchemy.db_session(key)) is session
        gone = weakref.ref(session)
        store.pop(key)
        del session
        gc.collect()
        assert gone() is None


@needs_reference_counts
def test_context_that_was_reset_is_freed_without_the_garbage_collector(ctxalchemy: ModuleType, key: Thing) -> None:
    gc.collect()
    gc.disable()
    try:
        with context(ctxalchemy) as store:
            store.put(key, Thing())
            run(awaited(ctxalchemy.db_session(key)))
            gone = weakref.ref(store)
            del store
        assert gone() is None
    finally:
        gc.enable()


def test_context_that_was_never_reset_is_collected(ctxalchemy: ModuleType, key: Thing) -> None:
    def open_one() -> weakref.ref[Any]:
        store = ctxalchemy._backend.open_context()
        store.put(key, store)
        return weakref.ref(store)

    gone = Context().run(open_one)
    gc.collect()
    assert gone() is None


def test_long_chain_of_contexts_that_were_never_reset_is_freed(ctxalchemy: ModuleType) -> None:
    def nest() -> None:
        for _ in range(100_000 if ctxalchemy.BACKEND == "native" else 1000):
            ctxalchemy._backend.open_context()

    Context().run(nest)
    gc.collect()


def test_finalizer_of_a_session_can_use_the_context_of_the_session(ctxalchemy: ModuleType, key: Thing) -> None:
    gone = []

    class UsesContext:
        def __del__(self) -> None:
            gone.append(len(store.items()))
            store.put(key, Thing())
            store.pop(other)
            run(ctxalchemy.db_session(key))

    other = Thing()
    store = ctxalchemy._backend.open_context()
    for _ in range(50):
        for db in (key, other, Thing(), Thing()):
            store.put(db, UsesContext())
        store.put(key, UsesContext())
        store.pop(key)
        store.clear()
        gc.collect()
    assert len(gone) == 250
    store.clear()
    ctxalchemy._backend.reset_context(store)


def test_concurrent_coroutines_return_the_sessions_of_their_own_databases(ctxalchemy: ModuleType) -> None:
    keys = [Thing() for _ in range(100)]
    with context(ctxalchemy) as store:
        for key in keys:
            store.put(key, [key])
        for _ in range(3):
            coroutines = [ctxalchemy.db_session(key) for key in keys]
            assert [run(each) for each in coroutines] == [[key] for key in keys]


def test_coroutine_type_cannot_be_instantiated_subclassed_copied_or_pickled(ctxalchemy: ModuleType, key: Thing) -> None:
    coroutine = ctxalchemy.db_session(key)
    coroutine.close()
    for create in (
        lambda: type(coroutine)(),
        lambda: object.__new__(type(coroutine)),
        lambda: type("Derived", (type(coroutine),), {}),
        lambda: copy.copy(coroutine),
        lambda: pickle.dumps(coroutine),
    ):
        with pytest.raises((TypeError, pickle.PicklingError)):
            create()


def test_value_of_the_variable_that_is_no_context_counts_as_no_context(
    ctxalchemy: ModuleType, store: Any, key: Thing
) -> None:
    if ctxalchemy.BACKEND == "python":
        pytest.skip("the pure-Python implementation raises AttributeError for such a value")
    variable = store.token.var
    token = variable.set("something else")
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        run(ctxalchemy.db_session(key))
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        ctxalchemy.db_session_nowait(key)
    assert not ctxalchemy.is_context_initiated()
    with pytest.raises(TypeError, match="expected a SessionStore"):
        type(store).get("something else", key)
    variable.reset(token)


# Threads


def test_threads_can_share_a_context(ctxalchemy: ModuleType, shared_store: Any, key: Thing) -> None:
    if ctxalchemy.BACKEND == "python":
        pytest.skip(
            "in pure Python, threads that share a context may look up sessions in it, but not change it concurrently"
        )
    others = [Thing() for _ in range(5)]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for turn in range(500):
                other = others[turn % len(others)]
                shared_store.put(other, [other])
                assert run(awaited(ctxalchemy.db_session(key))) is not None
                found = shared_store.get(other)
                assert found is None or found == [other]
                assert all(value == [db] for db, value in shared_store.items() if db is not key)
                if turn % 7 == 0:
                    shared_store.pop(other)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=copy_context().run, args=(work,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_only_one_of_several_threads_runs_the_same_coroutine(
    ctxalchemy: ModuleType, shared_store: Any, key: Thing
) -> None:
    for _ in range(50):
        coroutine = ctxalchemy.db_session(key)
        barrier = threading.Barrier(4)
        found: list[Any] = []

        def work(coroutine: Any = coroutine, barrier: threading.Barrier = barrier, found: list[Any] = found) -> None:
            barrier.wait()
            try:
                coroutine.send(None)
            except (StopIteration, RuntimeError, ValueError) as error:
                found.append(type(error))

        threads = [threading.Thread(target=copy_context().run, args=(work,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert found.count(StopIteration) == 1


# Event loops and tasks


async def _eager(ctxalchemy: ModuleType, db: Any) -> Any:
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("new in 3.12")
    asyncio.get_running_loop().set_task_factory(factory)
    return await _tasks(ctxalchemy, db)


async def _debug(ctxalchemy: ModuleType, db: Any) -> Any:
    asyncio.get_running_loop().set_debug(True)
    return await _tasks(ctxalchemy, db)


async def _tasks(ctxalchemy: ModuleType, db: Any) -> Any:
    task = asyncio.create_task(ctxalchemy.db_session(db))
    assert task.done() or "coro=<db_session()" in repr(task)
    found = [await task, *await asyncio.gather(*(ctxalchemy.db_session(db) for _ in range(10)))]
    async with asyncio.timeout(1):
        found.append(await ctxalchemy.db_session(db))
    task = asyncio.create_task(ctxalchemy.db_session(db))
    if not task.done():
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    return found


@pytest.mark.parametrize("kind", [_tasks, _eager, _debug])
@pytest.mark.parametrize("handler", [False, True])
def test_coroutine_runs_in_eager_tasks_and_in_debug_mode(ctxalchemy: ModuleType, kind: Any, handler: bool) -> None:
    async def wait(_database: Any) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        options = {"before_create_session_handler": wait} if handler else {}
        db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", **options)
        with context(ctxalchemy):
            found = await kind(ctxalchemy, db)
            assert len(set(map(id, found))) == 1

    asyncio.run(main())


def test_coroutine_runs_on_uvloop(ctxalchemy: ModuleType) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")
        with context(ctxalchemy):
            assert len(set(map(id, await _tasks(ctxalchemy, db)))) == 1

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_stack_of_a_waiting_task_can_be_printed(ctxalchemy: ModuleType) -> None:
    event = asyncio.Event()
    db = waiting_db(ctxalchemy, event)
    with context(ctxalchemy):
        task = asyncio.create_task(ctxalchemy.db_session(db))
        await asyncio.sleep(0)
        assert task.get_stack()
        task.print_stack()
        event.set()
        await task


# The module in its own process

_LEAKS = """
import gc, os, sys
import ctxalchemy._backend as backend
assert backend.BACKEND == sys.argv[1]

class Thing:
    pass

async def use(key):
    store = backend.open_context()
    for each in (key, Thing(), Thing()):
        store.put(each, Thing())
    session = await backend.db_session(key)
    assert session is backend.db_session_nowait(key)
    backend.db_session(key).close()
    assert len(store.items()) == 3
    store.close()
    backend.reset_context(store)
    try:
        await backend.db_session(key)
    except RuntimeError:
        pass

def blocks(times):
    key = Thing()
    for _ in range(times):
        try:
            use(key).send(None)
        except StopIteration:
            pass
    gc.collect()
    return sys.getallocatedblocks()

blocks(1000)
before = blocks(1000)
after = blocks(20000)
assert after - before < 100, (before, after)
"""


@needs_reference_counts
@pytest.mark.parametrize("backend", ["native", "python"])
def test_contexts_and_lookups_leak_no_memory(backend: str) -> None:
    _run_in_own_process(backend, _LEAKS)


_SUBINTERPRETER = """
import sys
import ctxalchemy._native
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("ctxalchemy._native", %r)
spec = importlib.util.spec_from_loader("ctxalchemy._native", loader)
try:
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
except ImportError:
    pass
else:
    raise SystemError("imported")
''' % ctxalchemy._native.__file__
for kind in ({"isolated": True}, {"isolated": False}) if sys.version_info < (3, 13) else ({"reqrefs": False},):
    interpreter = interpreters.create(**kind)
    failure = interpreters.run_string(interpreter, code)
    assert failure is None, failure
"""


@pytest.mark.parametrize("backend", ["native"])
def test_native_module_cannot_be_imported_in_a_subinterpreter(backend: str) -> None:
    _run_in_own_process(backend, _SUBINTERPRETER)


def _run_in_own_process(backend: str, code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = [path for path in sys.path if path]
        prologue = f"import sys; sys.path[:0] = {paths!r}\nimport os; os.environ['CTXALCHEMY_BACKEND'] = {backend!r}\n"
        done = subprocess.run(
            [sys.executable, *OPTIONS, "-c", prologue + code, backend], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr


@needs_reference_counts
async def test_awaiting_by_hand_keeps_no_session_alive(ctxalchemy: ModuleType) -> None:
    """As a debugger or a tracer awaits: through ``next()``, which raises StopIteration on every Python."""
    db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")
    sessions = []
    for _ in range(10):
        async with ctxalchemy.new_ctx():
            with pytest.raises(StopIteration):
                next(ctxalchemy.db_session(db).__await__())
            sessions.append(weakref.ref(ctxalchemy.db_session_nowait(db)))
    assert [session() for session in sessions] == [None] * 10
    await db.close()
