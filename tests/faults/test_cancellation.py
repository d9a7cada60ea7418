"""A request that is cancelled at any of its suspension points leaves nothing open.

Each request runs repeatedly.  The first run is cancelled at its first suspension point, the next run at its second
one, and so on, until a run ends before it is cancelled.  ``support.cancelling`` lists the manners of cancellation.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route
from support.apps import Answer, Kind, build, call, http_scope
from support.cancelling import Manner, Run, sweep
from support.faults import CommitGate, assert_whole, db_with, pids, psycopg_db
from support.interpreter import HAS_REFERENCE_COUNTS
from support.schema import Schema, add_note, checked_out, needs_asyncpg
from support.sessions import OverriddenSession, maker_creator
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

Endpoint = Callable[[], Awaitable[Answer]]


class World:
    """The databases that a request uses, and a record of its commits and responses.

    The n-th commit to the database ``first`` writes the note ``first n``.
    """

    def __init__(self, ctxalchemy: ModuleType, schema: Schema, create_db: Any = None) -> None:
        self.ctxalchemy = ctxalchemy
        self.schema = schema
        self._create_db = create_db or (lambda ctxalchemy, schema: schema.db(ctxalchemy))
        self.first = self.db("first")
        self.second = self.db("second")
        self.commits: Counter[str] = Counter()
        self.answers: list[int] = []
        self.uses_second = False
        self.checked = 0
        self.raised: LookupError | None = None
        self.context_restored: bool | None = None

    def db(self, name: str, **options: Any) -> Any:
        """A database with a pool of one, whose COMMITs are counted when they are sent."""
        plain = self._create_db(self.ctxalchemy, self.schema)

        def create_engine(host: str) -> AsyncEngine:
            engine: AsyncEngine = plain.engine_creator(host)
            event.listen(engine.sync_engine, "commit", lambda _: self.commits.update([name]))
            return engine

        maker = options.pop("maker", plain.session_maker_creator)
        return self.ctxalchemy.DBConnect(create_engine, maker, plain.host, **options)

    @property
    def databases(self) -> list[Any]:
        """The databases that the request uses."""
        return [self.first, self.second] if self.uses_second else [self.first]

    async def session(self, db: Any = None) -> AsyncSession:
        session: AsyncSession = await self.ctxalchemy.db_session(db or self.first)
        return session

    async def add(self, name: str, db: Any = None) -> None:
        self.uses_second = self.uses_second or db is self.second
        await add_note(await self.session(db), name)

    async def serve(self, endpoint: Endpoint, kind: Kind = "asgi") -> None:
        await self.call(build(kind, self.ctxalchemy, endpoint))

    async def call(self, app: Any) -> None:
        async def on_message(message: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            if message["type"] == "http.response.start":
                self.answers.append(message["status"])

        await call(app, on_message)


Request = Callable[[World], Awaitable[None]]


@dataclass
class Shape:
    """A request.

    Args:
        request: runs the request.
        notes: the notes that it commits.
        status: the status of its response.
        error: the error that it raises.
        points: the least number of suspension points.
        reconnects: its pools are empty when it begins.
        pool_in_use: the only connection of the pool is checked out by another task when it begins.
        handler: it has a slow ``before_create_session_handler``.
        maker: the options of another session maker.
    """

    request: Request
    notes: tuple[str, ...] = ("first 1",)
    status: int | None = 200
    error: type[Exception] | None = None
    points: int = 3
    reconnects: bool = False
    pool_in_use: bool = False
    handler: bool = False
    maker: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {}


def shape(**options: Any) -> Callable[[Request], Request]:
    def register(request: Request) -> Request:
        SHAPES[request.__name__] = Shape(request, **options)
        return request

    return register


# --- the requests ------------------------------------------------------------------------------------


@shape()
async def waits_in_its_endpoint(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("first 1")
        await asyncio.sleep(0.001)
        return Answer()

    await world.serve(endpoint)


@shape(reconnects=True, points=10)
async def opens_its_connection(world: World) -> None:
    await waits_in_its_endpoint(world)


@shape(pool_in_use=True)
async def waits_for_the_pool(world: World) -> None:
    await waits_in_its_endpoint(world)


@shape()
async def executes_a_slow_statement(world: World) -> None:
    async def endpoint() -> Answer:
        session = await world.session()
        await add_note(session, "first 1")
        await session.execute(text("SELECT pg_sleep(0.02)"))
        return Answer()

    await world.serve(endpoint)


@shape(notes=("first 1", "slow 1"))
async def commits_slowly(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("first 1")
        await world.add("slow 1")
        return Answer()

    await world.serve(endpoint)


@shape(notes=(), status=404)
async def rolls_back(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("undone")
        return Answer(404)

    await world.serve(endpoint)


@shape(notes=(), status=None, error=LookupError)
async def raises(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("undone")
        await world.add("undone too", world.second)
        raise LookupError("in the endpoint")

    await world.serve(endpoint)


@shape(notes=("first 1", "second 1"))
async def uses_two_databases(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("first 1")
        await world.add("second 1", world.second)
        return Answer()

    await world.serve(endpoint)


@shape(notes=(), status=400)
async def rolls_back_two_databases(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("undone")
        await world.add("undone too", world.second)
        return Answer(400)

    await world.serve(endpoint)


@shape(notes=("first 1", "first 2", "first 3"))
async def streams_and_has_a_background_task(world: World) -> None:
    async def stream() -> AsyncIterator[bytes]:
        await world.add("first 2")
        await (await world.session()).commit()
        yield b"one"

    async def background() -> None:
        await world.add("first 3")

    async def endpoint() -> Answer:
        await world.add("first 1")
        return Answer(200, stream(), background)

    await world.serve(endpoint)


@shape()
async def is_served_by_starlette(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("first 1")
        return Answer()

    await world.serve(endpoint, "starlette")


@shape()
async def is_served_by_fastapi(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("first 1")
        return Answer()

    await world.serve(endpoint, "fastapi")


@shape()
async def uses_the_dispatch_function(world: World) -> None:
    async def serve_request(_request: Any) -> Any:
        await world.add("first 1")
        return Answer().as_response()

    app = Starlette(routes=[Route("/", serve_request)])
    app.add_middleware(BaseHTTPMiddleware, dispatch=world.ctxalchemy.starlette.starlette_http_db_session_middleware)
    await world.call(app)


@shape(status=None)
async def is_a_websocket(world: World) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await world.add("first 1")
        await send({"type": "websocket.accept"})

    async def send(_message: Any) -> None:
        await asyncio.sleep(0)

    middleware = world.ctxalchemy.ASGIHTTPDBSessionMiddleware(app, websocket=True)
    await middleware({**http_scope(), "type": "websocket"}, None, send)


@shape(handler=True)
async def has_a_slow_before_create_session_handler(world: World) -> None:
    await waits_in_its_endpoint(world)


@shape(handler=True, points=8)
async def creates_its_first_session_in_several_tasks(world: World) -> None:
    async def endpoint() -> Answer:
        sessions = await asyncio.gather(*(world.session() for _ in range(3)))
        assert len(set(map(id, sessions))) == 1
        await add_note(sessions[0], "first 1")
        return Answer()

    await world.serve(endpoint)


@shape(maker={"class_": OverriddenSession, "info": {"journal": []}})
async def uses_a_session_subclass(world: World) -> None:
    await waits_in_its_endpoint(world)


@shape(notes=(), status=None, error=LookupError, maker={"class_": OverriddenSession, "info": {"journal": []}})
async def raises_with_a_session_subclass(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("undone")
        raise LookupError("in the endpoint")

    await world.serve(endpoint)


@shape(status=None)
async def uses_run_in_new_ctx(world: World) -> None:
    async def work() -> None:
        await world.add("first 1")
        await asyncio.sleep(0)

    await world.ctxalchemy.run_in_new_ctx(work)


@shape(notes=("first 1", "second 1"), status=None)
async def uses_new_ctx(world: World) -> None:
    async with world.ctxalchemy.new_ctx():
        await world.add("first 1")
        await world.add("second 1", world.second)


@shape(notes=("first 1", "first 2", "first 3"), status=None)
async def uses_atomic_db_session(world: World) -> None:
    async with world.ctxalchemy.new_ctx():
        await world.add("first 1")
        async with world.ctxalchemy.atomic_db_session(world.first, "commit") as session:
            await add_note(session, "first 2")
        await world.add("undone")
        async with world.ctxalchemy.atomic_db_session(world.first, "rollback") as session:
            await add_note(session, "first 3")


@shape(notes=("first 1", "slow 1"))
async def uses_savepoints(world: World) -> None:
    async def endpoint() -> Answer:
        await world.add("first 1")
        async with world.ctxalchemy.atomic_db_session(world.first, "savepoint"):
            await world.add("slow 1")
        with suppress(KeyError):
            async with world.ctxalchemy.atomic_db_session(world.first, "savepoint"):
                await world.add("undone")
                raise KeyError
        return Answer()

    await world.serve(endpoint)


@shape(status=None)
async def uses_new_non_ctx_atomic_session(world: World) -> None:
    async with world.ctxalchemy.new_non_ctx_atomic_session(world.first) as session:
        await add_note(session, "first 1")


@shape(notes=(), status=None)
async def closes_a_session_in_a_transaction(world: World) -> None:
    async with world.ctxalchemy.new_non_ctx_session(world.first) as session:
        await add_note(session, "undone")


@shape(status=None)
async def opens_and_resets_its_own_context(world: World) -> None:
    package = world.ctxalchemy
    token = package.init_db_session_ctx()
    try:
        await world.add("first 1")
        await package.commit_db_session(world.first)
        await world.add("undone")
        await package.rollback_db_session(world.first)
        await world.add("undone")
        await package.close_db_session(world.first)
        await world.add("undone")
        await world.add("undone too", world.second)
    finally:
        await package.reset_db_session_ctx(token)


@shape(status=None)
async def runs_in_a_test_context(world: World) -> None:
    async with world.ctxalchemy.testing.set_test_context(auto_close=True):
        await world.add("first 1")


@shape(notes=(), status=None, points=6)
async def uses_a_rollback_session(world: World) -> None:
    testing = world.ctxalchemy.testing
    async with (
        testing.rollback_session(world.first) as session,
        testing.set_test_context(),
        testing.put_savepoint_session_in_ctx(world.first, session) as inner,
    ):
        await add_note(inner, "undone")
        await inner.commit()


@shape(notes=("first 1", "second 1"), points=8)
async def calls_another_application_in_process(world: World) -> None:
    async def inner() -> Answer:
        await world.add("second 1", world.second)
        return Answer()

    async def endpoint() -> Answer:
        await call(build("asgi", world.ctxalchemy, inner))
        await world.add("first 1")
        return Answer()

    await world.serve(endpoint)


# --- the checks --------------------------------------------------------------------------------------


@asynccontextmanager
async def prepared(world: World, shape: Shape) -> AsyncIterator[None]:
    options: dict[str, Any] = {}
    if shape.handler:

        async def handler(_db: Any) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)

        options["before_create_session_handler"] = handler
    if shape.maker:
        options["maker"] = maker_creator(**shape.maker)
    if options:
        world.first = world.db("first", **options)
    if "slow 1" in shape.notes:
        await world.schema.observer.execute(
            "CREATE FUNCTION take_a_while() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END $$;"
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW WHEN (NEW.name LIKE 'slow%') EXECUTE FUNCTION take_a_while()"
        )
    try:
        yield
    finally:
        for db in (world.first, world.second):
            await db.close()


Check = Callable[[World, Run], Awaitable[None]]


async def cancel_everywhere(world: World, shape: Shape, manner: Manner, check: Check) -> None:
    ctxalchemy, schema = world.ctxalchemy, world.schema
    async with prepared(world, shape):
        await assert_whole(ctxalchemy, schema, world.first, world.second, notes=[])
        other_task: asyncio.Task[None] | None = None
        turns = count()

        async def check_out() -> None:
            async with ctxalchemy.new_non_ctx_session(world.first) as session:
                await session.connection()
                await asyncio.sleep(0.01)

        async def before() -> None:
            nonlocal other_task
            if not HAS_REFERENCE_COUNTS and next(turns) % 8 == 0:
                # psycopg closes a connection that it was still opening only in its finalizer.  Without this
                # collection the server would run out of connections.
                gc.collect()
            await schema.observer.execute("DELETE FROM note")
            if shape.reconnects:
                for db in world.databases:
                    await db.close()
            if shape.pool_in_use:
                other_task = asyncio.create_task(check_out())
                assert await eventually(lambda: checked_out(world.first))
            world.commits.clear()
            world.answers.clear()
            world.raised = world.context_restored = None

        async def request() -> None:
            outer = ctxalchemy._backend.current_context()
            try:
                await shape.request(world)
            except LookupError as error:
                world.raised = error
                raise
            finally:
                world.context_restored = ctxalchemy._backend.current_context() is outer

        async def check_run(run: Run) -> None:
            if other_task is not None:
                await other_task
            await check(world, run)

        assert await sweep(manner, request, check_run, before=before, step=3) >= shape.points


def messages_of(error: BaseException | None) -> str:
    """The representation, message and notes of an error, and those of its causes and contexts."""
    if error is None:
        return ""
    messages = [repr(error), str(error), *getattr(error, "__notes__", [])]
    return "\n".join([*messages, messages_of(error.__cause__), messages_of(error.__context__)])


async def assert_nothing_open(world: World, shape: Shape, run: Run) -> None:
    """Assert that the run has left nothing open and has committed only notes that it may commit."""
    commits, answers = world.commits.copy(), list(world.answers)
    left = [await checked_out(db) for db in world.databases]
    assert not any(left)
    assert world.context_restored
    assert await world.schema.has_no_open_transaction()
    notes = await world.schema.notes()
    for note in shape.notes:
        name, number = note.replace("slow", "first").split()
        if commits[name] > int(number) or (not run.cancellations and shape.error is None):
            assert note in notes, "a note is missing although its COMMIT succeeded"
        elif commits[name] < int(number):
            assert note not in notes, "a note is committed without a COMMIT"
    if answers and answers[0] < 400 and shape.status is not None:
        assert set(notes) >= {note for note in shape.notes if note in ("first 1", "slow 1", "second 1")}
    assert set(notes) <= set(shape.notes)
    assert world.ctxalchemy.is_context_initiated() is False
    if world.checked != run.point:
        # After the other runs at this point, the next run shows that the next request succeeds.
        world.checked = run.point
        await assert_whole(world.ctxalchemy, world.schema, *world.databases, notes=notes)


MANNERS: tuple[Manner, ...] = ("late", "again", "scope")
"""``once`` is not needed: at each point, the last run of ``again`` is cancelled only once."""

CANCELLED_WITH_EVERYTHING = (
    "waits_in_its_endpoint",
    "opens_its_connection",
    "waits_for_the_pool",
    "commits_slowly",
    "raises",
    "uses_two_databases",
    "rolls_back_two_databases",
    "uses_the_dispatch_function",
    "uses_run_in_new_ctx",
    "uses_new_ctx",
)
OVER_PSYCOPG = (
    "waits_in_its_endpoint",
    "opens_its_connection",
    "waits_for_the_pool",
    "executes_a_slow_statement",
    "commits_slowly",
    "uses_two_databases",
    "uses_savepoints",
)


def check_of(shape: Shape, manner: Manner) -> Check:
    async def check(world: World, run: Run) -> None:
        if run.cancellations:
            assert type(run.error) is asyncio.CancelledError, "another error was raised"
            if world.raised is not None and manner != "scope":
                assert "in the endpoint" in messages_of(run.error), "the first error is masked"
        elif shape.error is not None:
            assert run.error is world.raised
        else:
            assert run.error is None
            assert world.answers == ([] if shape.status is None else [shape.status])
        assert run.complaints == []
        await assert_nothing_open(world, shape, run)

    return check


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", SHAPES)
async def test_cancelled_request_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, name: str, manner: Manner
) -> None:
    shape = SHAPES[name]
    await cancel_everywhere(World(ctxalchemy, schema), shape, manner, check_of(shape, manner))


@pytest.mark.parametrize("name", CANCELLED_WITH_EVERYTHING)
async def test_request_whose_clean_up_tasks_are_cancelled_too_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, name: str
) -> None:
    shape = SHAPES[name]
    await cancel_everywhere(World(ctxalchemy, schema), shape, "everything", check_of(shape, "everything"))


@pytest.mark.parametrize("manner", ["again", "scope"])
@pytest.mark.parametrize("name", OVER_PSYCOPG)
async def test_cancelled_request_over_psycopg_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, name: str, manner: Manner
) -> None:
    shape = SHAPES[name]
    world = World(ctxalchemy, schema, psycopg_db)
    await cancel_everywhere(world, shape, manner, check_of(shape, manner))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "name",
    [
        "waits_in_its_endpoint",
        "executes_a_slow_statement",
        "commits_slowly",
        "rolls_back",
        "raises",
        "uses_two_databases",
        "is_served_by_starlette",
        "is_a_websocket",
        "uses_a_session_subclass",
    ],
)
async def test_request_whose_coroutine_is_closed_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, name: str
) -> None:
    """During a statement, SQLAlchemy awaits its clean-up even in a coroutine that is closed: Python raises an error."""

    async def check(world: World, run: Run) -> None:
        if run.cancellations:
            assert run.error is None or "coroutine ignored GeneratorExit" in messages_of(run.error)
        await assert_nothing_open(world, SHAPES[name], run)

    await cancel_everywhere(World(ctxalchemy, schema), SHAPES[name], "thrown away", check)


# --- single points -----------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [None, 0, 1, 2, 3, 4])
async def test_cancellation_during_the_second_commit_notes_that_one_session_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any, later: int | None
) -> None:
    """The request is cancelled during the second of three COMMITs, and again while the rest is rolled back."""

    async def endpoint() -> Answer:
        for each, name in ((db, "first"), (other_db, "slow second"), (third_db, "third")):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    async with CommitGate.close(schema) as gate:
        request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
        await gate.reached()
        request.cancel()
        if later is not None:
            for _ in range(later):
                await asyncio.sleep(0)
            request.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await request
        messages = messages_of(caught.value)
    assert "1 session(s) had been committed" in messages
    assert await schema.has_no_open_transaction()
    assert await schema.notes() in (["first"], ["first", "slow second"])
    await assert_whole(ctxalchemy, schema, db, other_db, third_db, notes=await schema.notes())


async def test_inner_request_that_times_out_does_not_affect_the_outer_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def inner() -> Answer:
        session = await ctxalchemy.db_session(other_db)
        await add_note(session, "undone")
        await session.execute(text("SELECT pg_sleep(10)"))
        return Answer()

    async def outer() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "before")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call(build("asgi", ctxalchemy, inner))
        assert await checked_out(other_db) == 0
        assert await ctxalchemy.db_session(db) is session
        await add_note(session, "after")
        return Answer()

    sent = await call(build("asgi", ctxalchemy, outer))
    assert sent[0]["status"] == 200
    await assert_whole(ctxalchemy, schema, db, other_db, notes=["before", "after"])


@needs_asyncpg
async def test_server_ends_a_statement_whose_connection_was_terminated(ctxalchemy: ModuleType, schema: Schema) -> None:
    """If a request is cancelled twice in a row, the driver cannot send a cancel request to the server.

    By default, the server then detects that the connection is closed only when the statement ends.  With
    ``client_connection_check_interval`` the server detects it during the statement.
    """
    settings = {
        "search_path": schema.name,
        "application_name": schema.name,
        "client_connection_check_interval": "50ms",
    }
    db = ctxalchemy.DBConnect.from_url(
        schema.url, pool_size=1, max_overflow=0, pool_timeout=5, connect_args={"server_settings": settings}
    )

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "undone")
        await session.execute(text("SELECT pg_sleep(60)"))
        return Answer()

    async def is_executing() -> bool:
        return await schema.backends() == ["active"]

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    assert await eventually(is_executing)
    # A server that shuts down cancels all tasks.  asyncpg sends the cancel request from a task of its own.
    tasks_before = asyncio.all_tasks()
    request.cancel()
    while not request.done():
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - tasks_before | {request}:
            task.cancel()
    assert request.cancelled()
    assert await schema.has_no_open_transaction()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_cancelled_block_is_rolled_back_in_a_process_without_anyio(
    ctxalchemy: ModuleType, schema: Schema, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "lost")
            await asyncio.sleep(10)

    async def has_begun() -> bool:
        return "idle in transaction" in await schema.backends()

    task = asyncio.create_task(work())
    assert await eventually(has_begun)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "anyio")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await assert_whole(ctxalchemy, schema, db, notes=[])


class StuckSession(AsyncSession):
    """A session whose ``close`` ends only if it is cancelled.  It then closes the session, or not."""

    closes_in_the_end = False

    async def close(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self.closes_in_the_end:
                raise
            await asyncio.sleep(0.1)
            await super().close()


class FinallyClosingSession(StuckSession):
    closes_in_the_end = True


@pytest.mark.parametrize("session_class", [StuckSession, FinallyClosingSession])
async def test_close_of_a_session_class_that_is_cut_off_leaves_no_connection_checked_out(
    ctxalchemy: ModuleType, schema: Schema, monkeypatch: pytest.MonkeyPatch, session_class: type[StuckSession]
) -> None:
    """After its time, the cleanup is cancelled once.  It has another second to end."""
    monkeypatch.setattr(sys.modules["ctxalchemy._shield"], "CLEANUP_TIMEOUT", 0.2)
    db = db_with(ctxalchemy, schema, session_class)
    before: set[int] = set()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        before.update(await pids(schema))
        task.cancel()
        await asyncio.sleep(10)
        return Answer()

    task = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert await checked_out(db) == 0
    assert await schema.has_no_open_transaction()
    assert await schema.notes() == []
    if session_class.closes_in_the_end:
        assert await pids(schema) == before
    await db.close()
