"""Requests of random shape with random faults, and a ledger of their writes that must balance after each round."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import weakref
from collections import Counter
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from .apps import KINDS, Answer, Kind, build, call, http_scope
from .faults import assert_serves
from .pgbouncer import PooledSchema, with_database
from .read_only import pool_of_reads
from .schema import Schema, add_note, break_commit, checked_out, count_notes, pool_of
from .server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSession

REQUESTS = 120
"""The number of requests in a round."""
AT_ONCE = 20
"""The number of concurrent requests."""
SETTING = "app.soak"
POOL: dict[str, Any] = {"pool_size": 10, "max_overflow": 50, "pool_timeout": 20}
"""A request may use three connections of a pool at once: its own, that of the nested request that it makes in process,
and that of the task that outlives it."""


@dataclass
class Plan:
    """A request: what it does, and its outcome."""

    number: int
    kind: Kind
    over_tcp: bool
    databases: list[int]
    writes: int
    ending: str
    statement: float
    idle: float
    gathers: bool
    after: str
    outliving: str
    savepoint: str
    registers: str
    sets: bool
    read_only: bool
    disconnect_after: float | None
    inner: Plan | None = None

    attempted: dict[int, list[str]] = field(default_factory=dict)
    """The notes that it wrote on each database before the start of its response."""
    must: set[str] = field(default_factory=set)
    """Notes written after the start of the response that must be committed."""
    may: set[str] = field(default_factory=set)
    """Notes written after the start of the response that may be committed."""
    committed: int = 0
    """How often the callback of ``on_commit`` was called."""
    rolled_back: int = 0
    """How often the callback of ``on_rollback`` was called."""
    registered: bool = False
    committing: bool = False
    status: int | None = None
    error: BaseException | None = None
    wrong: list[str] = field(default_factory=list)
    """Descriptions of what went wrong in this request."""

    @classmethod
    def draw(cls, random: Random, number: int, *, inner: bool = False) -> Plan:
        plan = cls(
            number=number,
            kind=random.choice(KINDS),
            over_tcp=not inner and random.random() < 0.6,
            databases=random.choice([[0], [0], [1], [0, 1], [1, 0]]),
            writes=random.randint(1, 3),
            ending=random.choices(["success", "refused", "handled", "raises"], [6, 2, 1, 1])[0],
            statement=random.choice([0, 0, 0, 0.001, 0.01]),
            idle=random.choice([0, 0, 0.001, 0.005]),
            gathers=random.random() < 0.2,
            after=random.choice(["", "", "stream", "broken stream", "background", "broken background", "at the end"]),
            outliving=random.choice(
                ["", "", "", "in a new context", "with attempts", "in the closed context", "in the same session"]
            ),
            savepoint=random.choice(["", "", "released", "rolled back"]),
            registers=random.choice(["", "", "a function", "an async function"]),
            sets=random.random() < 0.3,
            read_only=random.random() < 0.12,
            disconnect_after=random.uniform(0, 0.06) if random.random() < 0.35 else None,
        )
        if not inner and random.random() < 0.15:
            plan.inner = cls.draw(random, number + REQUESTS, inner=True)
        return plan

    def name(self, what: str) -> str:
        return f"{self.number:03} {what}"

    @property
    def setting(self) -> str:
        """The value of the setting in all transactions of the first database; empty if there is none."""
        return str(self.number) if self.sets else ""


class UndoneError(Exception):
    """Ends a savepoint block, which is undone."""


class Soak:
    """Runs rounds of random requests.

    Args:
        ctxalchemy: the package.
        schema: the schema that the requests write to.
        pooled: the same schema, reached through PgBouncer; the second database then connects through PgBouncer.
        seed: determines all random decisions, but not the timing.
    """

    def __init__(self, ctxalchemy: ModuleType, schema: Schema, seed: int, pooled: PooledSchema | None = None) -> None:
        self.seed = seed
        self.rounds = 0
        self.happened: Counter[str] = Counter()
        self.sizes: list[int] = []
        self._ctxalchemy = ctxalchemy
        self._backend = sys.modules.get("ctxalchemy._backend") or ctxalchemy._backend
        self._schema = schema
        self._pooled = pooled
        # Not over psycopg: if psycopg is interrupted during its own clean-up, it closes a socket that the event loop
        # still watches.  The next user of the same file descriptor, such as a client in this process, then fails.
        self._databases = (schema.db(ctxalchemy, **POOL), (pooled or schema).db(ctxalchemy, **POOL))
        self._plan: ContextVar[Plan] = ContextVar("plan")
        self._plans: dict[int, Plan] = {}
        self._apps = {
            kind: build(
                kind, ctxalchemy, self._endpoint, before_commit=self._hook, read_only_if=lambda s: self._of(s).read_only
            )
            for kind in KINDS
        }
        self._outliving: set[asyncio.Task[None]] = set()
        self._contexts: list[weakref.ref[Any]] = []
        self._sessions: list[weakref.ref[AsyncSession]] = []
        self._port = 0

    @classmethod
    @asynccontextmanager
    async def create(
        cls, ctxalchemy: ModuleType, server_url: str, seed: int, pgbouncer_url: str | None = None
    ) -> AsyncIterator[Soak]:
        """Serve the application.  With a URL of PgBouncer, the second database connects through it."""
        async with contextlib.AsyncExitStack() as stack:
            if pgbouncer_url is None:
                soak = cls(ctxalchemy, await stack.enter_async_context(Schema.create(server_url)), seed)
            else:
                pooled = await stack.enter_async_context(PooledSchema.create_behind(pgbouncer_url, server_url))
                schema = Schema(with_database(server_url, pooled.name), pooled.name, pooled.observer)
                soak = cls(ctxalchemy, schema, seed, pooled)
            async with serve(soak._app, interface="asgi3") as url:
                soak._port = int(url.rpartition(":")[2])
                yield soak
            for db in soak._databases:
                await db.close()

    async def round(self) -> None:
        """Run a round, and assert that the ledger balances."""
        self.rounds += 1
        random = Random(f"{self.seed} {self.rounds}")
        plans = [Plan.draw(random, number) for number in range(REQUESTS)]
        self._plans = {plan.number: plan for plan in plans}
        self._plans |= {plan.inner.number: plan.inner for plan in plans if plan.inner is not None}
        turns = asyncio.Semaphore(AT_ONCE)

        async def run(plan: Plan) -> None:
            async with turns:
                await (self._run_over_tcp(plan) if plan.over_tcp else self._run_in_process(plan))

        ended = asyncio.Event()
        terminating = asyncio.create_task(self._terminate_at_random_times(random, ended))
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*map(run, plans))
        finally:
            ended.set()
            await terminating
        await self._balance()

    def watch_context(self) -> None:
        """Assert after the round that the current context is closed by then."""
        self._contexts.append(weakref.ref(self._backend.current_context()))

    # --- clients -------------------------------------------------------------------------------------

    async def _run_over_tcp(self, plan: Plan) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"GET /?{plan.number} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        try:
            async with asyncio.timeout(plan.disconnect_after):
                answer = await reader.read()
        except TimeoutError:
            self.happened["disconnected over TCP"] += 1
            writer.transport.abort()
        except ConnectionError:
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        if plan.disconnect_after is None and plan.status is None and plan.error is None:
            plan.wrong.append("the application never received the request")
        if answer.startswith(b"HTTP/1.1 2") and plan.status != 200:
            plan.wrong.append(f"the client received a success, but the application sent {plan.status}")

    async def _run_in_process(self, plan: Plan) -> None:
        task = asyncio.create_task(call(self._app, scope=self._scope(plan)))
        done, _ = await asyncio.wait((task,), timeout=plan.disconnect_after)
        if not done:
            task.cancel()
            if plan.number % 2:
                await asyncio.sleep(0)
                task.cancel()
            self.happened["cancelled in process"] += 1
            await asyncio.wait((task,))
            if not task.cancelled():
                # Either the request ended at the same moment, or the cancellation was replaced by another error.
                error = task.exception()
                if error is not None and error is not plan.error:
                    plan.wrong.append(f"the cancellation was replaced by {error!r}")
        with contextlib.suppress(Exception, asyncio.CancelledError):
            task.result()

    def _scope(self, plan: Plan) -> dict[str, Any]:
        return {**http_scope(), "query_string": str(plan.number).encode()}

    async def _terminate_at_random_times(self, random: Random, ended: asyncio.Event) -> None:
        while not ended.is_set():
            await asyncio.sleep(random.uniform(0.01, 0.08))
            terminated = await self._schema.observer.fetch(
                "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity "
                "WHERE application_name LIKE $1 ORDER BY md5(pid::text || $2) LIMIT 1) AS one",
                f"{self._schema.name}%",
                str(random.random()),
            )
            self.happened["terminated by the server"] += len(terminated)
            if self._pooled is not None and random.random() < 0.01:
                await self._pooled.stop_pgbouncer()
                await self._pooled.start_pgbouncer()
                self.happened["restarts of PgBouncer"] += 1

    # --- the application -----------------------------------------------------------------------------

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        """The outermost ASGI layer, around the middleware: it records what the server receives."""
        plan = self._of(scope)
        outer = self._backend.current_context()
        token = self._plan.set(plan)

        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                plan.status = message["status"]
            await send(message)

        try:
            await self._apps[plan.kind](scope, receive, send_on)
        except BaseException as error:
            plan.error = error
            raise
        finally:
            self._plan.reset(token)
            if self._backend.current_context() is not outer:
                plan.wrong.append("the context after the request is not the context before it")

    def _of(self, scope: Any) -> Plan:
        return self._plans[int(scope["query_string"])]

    async def _hook(self, _session: AsyncSession) -> None:
        self._plan.get().committing = True

    async def _endpoint(self) -> Answer:
        plan = self._plan.get()
        package = self._ctxalchemy
        self.watch_context()
        if plan.read_only:
            return await self._read(plan)
        first = self._databases[plan.databases[0]]
        if plan.registers:
            self._register(plan)
        if plan.sets:
            await package.set_local(first, {SETTING: plan.setting})
        if plan.gathers:
            one, two = await asyncio.gather(package.db_session(first), package.db_session(first))
            if one is not two:
                plan.wrong.append("the request has two sessions for one database")
        for number in range(plan.writes):
            for index in plan.databases:
                name = plan.name(f"{index} {number}")
                plan.attempted.setdefault(index, []).append(name)
                await add_note(await package.db_session(self._databases[index]), name)
        await self._check_setting(plan, await package.db_session(first))
        if plan.savepoint:
            await self._run_block(plan)
        last = await package.db_session(self._databases[plan.databases[-1]])
        self._sessions.append(weakref.ref(last))
        if plan.statement:
            await last.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": plan.statement})
        if plan.inner is not None:
            with contextlib.suppress(Exception):
                await call(self._app, scope=self._scope(plan.inner))
        if plan.outliving:
            task = asyncio.create_task(self._outlive(plan, last))
            self._outliving.add(task)
        await asyncio.sleep(plan.idle)
        if plan.ending == "raises":
            raise LookupError("in the endpoint")
        if plan.ending == "refused":
            await break_commit(last)
        return Answer(
            404 if plan.ending == "handled" else 200,
            self._stream(plan) if plan.after.endswith("stream") else None,
            partial(self._background, plan) if plan.after and not plan.after.endswith("stream") else None,
        )

    def _register(self, plan: Plan) -> None:
        db = self._databases[plan.databases[0]]

        def after_commit() -> None:
            plan.committed += 1
            self.happened["callbacks of on_commit"] += 1

        async def after_commit_async() -> None:
            after_commit()
            name = plan.name("callback")
            plan.may.add(name)
            await add_note(await self._ctxalchemy.db_session(db), name)

        def after_rollback() -> None:
            plan.rolled_back += 1
            self.happened["callbacks of on_rollback"] += 1

        is_async = plan.registers == "an async function" and not plan.read_only
        self._ctxalchemy.on_commit(db, after_commit_async if is_async else after_commit)
        self._ctxalchemy.on_rollback(db, after_rollback)
        plan.registered = True

    async def _check_setting(self, plan: Plan, session: AsyncSession) -> None:
        value = await session.scalar(text(f"SELECT coalesce(current_setting('{SETTING}', true), '')"))
        self.happened["transactions whose settings were checked"] += 1
        if value != plan.setting:
            plan.wrong.append(f"a transaction has the setting {value!r} in place of {plan.setting!r}")

    async def _run_block(self, plan: Plan) -> None:
        """Run a savepoint block.  The ledger does not contain what is undone."""
        index = plan.databases[-1]
        name = plan.name(f"{index} {plan.savepoint}")
        if plan.savepoint == "released":
            plan.attempted[index].append(name)
        with contextlib.suppress(UndoneError):
            async with self._ctxalchemy.atomic_db_session(self._databases[index], "savepoint") as session:
                await add_note(session, name)
                if plan.savepoint == "rolled back":
                    raise UndoneError
        self.happened[f"savepoint blocks {plan.savepoint}"] += 1

    async def _read(self, plan: Plan) -> Answer:
        """Serve a read-only request.  The database refuses its write."""
        plan.databases = [0]  # PgBouncer ignores the setting that refuses writes.
        db = self._databases[0]
        if plan.registers:
            self._register(plan)
        if plan.sets:
            await self._ctxalchemy.set_local(db, {SETTING: plan.setting})
        session = await self._ctxalchemy.db_session(db)
        self._sessions.append(weakref.ref(session))
        await count_notes(session)
        await self._check_setting(plan, session)
        await asyncio.sleep(plan.idle)
        if plan.ending == "raises":
            raise LookupError("in the endpoint")
        try:
            await add_note(session, plan.name("read-only"))
        except DBAPIError as error:
            if "read-only transaction" not in str(error):
                raise
        self.happened["read-only requests"] += 1
        return Answer(
            404 if plan.ending == "handled" else 200,
            self._read_stream(plan) if plan.after.endswith("stream") else None,
        )

    async def _read_stream(self, plan: Plan) -> AsyncIterator[bytes]:
        for number in range(3):
            session = await self._ctxalchemy.db_session(self._databases[0])
            yield str(await count_notes(session)).encode()
            await self._check_setting(plan, session)
            if plan.after == "broken stream" and number == 1:
                raise LookupError("in the stream")

    async def _stream(self, plan: Plan) -> AsyncIterator[bytes]:
        db = self._databases[plan.databases[0]]
        for number in range(3):
            session = await self._ctxalchemy.db_session(db)
            yield str(await count_notes(session)).encode()
            await self._check_setting(plan, session)
            name = plan.name(f"stream {number}")
            plan.may.add(name)
            await add_note(session, name)
            await session.commit()
            plan.must.add(name)
            if plan.after == "broken stream" and number == 1:
                raise LookupError("in the stream")

    async def _background(self, plan: Plan) -> None:
        db = self._databases[plan.databases[0]]
        name = plan.name("background")
        plan.may.add(name)
        if plan.after == "at the end":
            await add_note(await self._ctxalchemy.db_session(db), name)
            return
        async with self._ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, name)
        plan.must.add(name)
        if plan.after == "broken background":
            rolled_back = plan.name("rolled back")
            await add_note(await self._ctxalchemy.db_session(db), rolled_back)
            raise LookupError("in the background")

    async def _outlive(self, plan: Plan, session: AsyncSession) -> None:
        package = self._ctxalchemy
        db = self._databases[plan.databases[0]]
        name = plan.name("outliving")

        async def write() -> None:
            session = await package.db_session(db)
            await self._check_setting(plan, session)
            await add_note(session, name)

        # The package is imported for each backend, and has no types here.
        @package.in_new_ctx(attempts=3)  # type: ignore[untyped-decorator]
        async def write_serializably() -> None:
            self.happened["attempts of functions"] += 1
            session = await package.db_session(db)
            await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            await count_notes(session)
            await write()

        await asyncio.sleep(plan.idle + plan.statement)
        try:
            if plan.outliving == "in a new context":
                plan.may.add(name)
                await package.run_in_new_ctx(write)
                plan.must.add(name)
            elif plan.outliving == "with attempts":
                plan.may.add(name)
                await write_serializably()
                self.happened["functions with attempts that returned"] += 1
                plan.must.add(name)
            elif plan.outliving == "in the same session":
                plan.may.add(name)
                await add_note(session, name)
            else:
                while package.is_context_initiated():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                await write()
                plan.wrong.append("db_session made a session in a closed context")
        except IntegrityError as error:
            # A function ran again although its first attempt was committed.
            plan.wrong.append(f"a task that outlived its request wrote twice: {error!r}")
        except package.ContextClosedError:
            self.happened["outlived their request: ContextClosedError"] += 1
        except Exception:
            # Its connection was terminated, or the request has closed its session.
            self.happened["outlived their request: another error"] += 1

    # --- the ledger ----------------------------------------------------------------------------------

    async def _balance(self) -> None:
        where = f"seed {self.seed}, round {self.rounds}"
        while self._serves_requests():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        outliving, self._outliving = self._outliving, set()
        await asyncio.gather(*outliving)
        for plan in self._plans.values():
            self._check_callbacks(plan)
        must: set[str] = set()
        may: set[str] = set()
        for plan in self._plans.values():
            assert plan.wrong == [], f"{where}: {plan.wrong} in {plan}"
            certain, possible = self._expected_notes(plan)
            must |= certain
            may |= possible
            self.happened["requests"] += 1
            self.happened[f"answered with {plan.status}"] += 1
            if plan.error is not None:
                self.happened[f"raised {type(plan.error).__name__}"] += 1
        await self._assert_no_open_transaction(where)
        notes = set(await self._schema.notes())
        assert must <= notes, f"{where}: not committed: {self._describe(must - notes)}"
        assert notes <= must | may, f"{where}: not rolled back: {self._describe(notes - must - may)}"
        backends = len(await self._schema.backends())
        assert backends <= 3 * (POOL["pool_size"] + POOL["max_overflow"]), f"{where}: {backends} server processes"
        self.happened["writes that must be committed"] += len(must)
        self.happened["writes that may be committed"] += len(may - must)

        await self._schema.observer.execute("DELETE FROM note")
        for db in self._databases:
            await self._assert_pooled_connections_work(db)
        await assert_serves(self._ctxalchemy, *self._databases)
        await self._assert_no_open_transaction(where)
        await self._schema.observer.execute("DELETE FROM note")
        for plan in self._plans.values():
            # The traceback of the error would keep the objects of the request alive.
            plan.error = None
        self._plans.clear()
        del outliving
        gc.collect()
        assert not any(session() for session in self._sessions), f"{where}: a session is still referenced"
        self._sessions.clear()
        # asyncio's timers and transports keep the contextvars context in which they were made, as long as they exist.
        # An empty context is false.
        for context in [context for reference in self._contexts if (context := reference()) is not None]:
            assert context.closed, f"{where}: a context is open"
            assert not len(context), f"{where}: a context is not empty"
        self._contexts = [reference for reference in self._contexts if reference() is not None]
        self.happened["closed contexts that are still referenced"] = len(self._contexts)
        self.sizes.append(len(gc.get_objects()))

    async def _assert_no_open_transaction(self, where: str) -> None:
        """Assert that no connection is checked out, in a transaction, or assigned to a client by PgBouncer."""
        for db in self._databases:
            assert await checked_out(db) == 0, f"{where}: a connection is still checked out"
        reads = await pool_of_reads(self._ctxalchemy, self._databases[0])
        assert reads.checkedout() == 0, f"{where}: a read-only connection is still checked out"
        if not await self._schema.has_no_open_transaction():
            raise AssertionError(f"{where}: a transaction is still open: {await self._schema.activity()}")
        if self._pooled is not None:
            assigned = await self._pooled.assigned()
            assert not assigned, f"{where}: PgBouncer has still assigned {assigned} server connections to clients"

    async def _assert_pooled_connections_work(self, db: Any) -> None:
        """Assert that each connection in the pool is in no transaction and works, or was terminated by the server."""
        pool = await pool_of(db)
        sessions = [await db.create_session() for _ in range(pool.checkedin())]
        for session in sessions:
            try:
                raw = await (await session.connection()).get_raw_connection()
                assert not raw.driver_connection.is_in_transaction(), "the pool contains a connection in a transaction"
                await count_notes(session)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise AssertionError(f"seed {self.seed}, round {self.rounds}: {error!r}") from error
        for session in sessions:
            await session.close()

    def _serves_requests(self) -> bool:
        names = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
        return any(name.startswith("RequestResponseCycle") for name in names)

    def _expected_notes(self, plan: Plan) -> tuple[set[str], set[str]]:
        """Return the notes of this request that must be committed, and those that may be committed."""
        package = self._ctxalchemy
        written = {name for names in plan.attempted.values() for name in names}
        error: Any = plan.error
        must, may = set(plan.must), set(plan.may)
        if plan.status is not None and plan.status < 400:
            must |= written
        elif plan.status == 404:
            # Rolled back.  ``must`` and ``may`` of the plan contain what was written after the start of the response.
            pass
        elif isinstance(error, package.PartialCommitError):
            for db in error.committed:
                must |= set(plan.attempted[self._databases.index(db)])
            if not isinstance(error.__cause__, IntegrityError):
                may |= set(plan.attempted[self._databases.index(error.failed[0])])
        elif plan.committing and not isinstance(error, IntegrityError):
            # Cancelled or disconnected during COMMIT: the outcome is unknown.
            may |= written
        if plan.committed and not plan.read_only:
            must |= set(plan.attempted[plan.databases[0]])
        if plan.after == "at the end" and plan.status == 200 and error is None and not plan.read_only:
            must.add(plan.name("background"))
        return must, may

    def _check_callbacks(self, plan: Plan) -> None:
        if not plan.registered:
            return
        calls = (plan.committed, plan.rolled_back)
        if plan.status is not None and plan.status < 400:
            expected = [(1, 0)]
        elif plan.status == 404:
            expected = [(0, 1)]
        else:
            expected = [(1, 0), (0, 1)]
        if calls not in expected:
            plan.wrong.append(f"the callbacks were called {calls} times, in place of {expected}")

    def _describe(self, notes: set[str]) -> str:
        return "; ".join(f"{note} of {self._plans.get(int(note[:3]))}" for note in sorted(notes)[:5])
