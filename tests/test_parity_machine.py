"""Both backends return the same results: each runs the same random operations, and every result is compared."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextvars import Context, Token
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

Operation = Callable[["Side"], Any]
DATABASES = st.integers(0, 3)
SESSIONS = st.integers(0, 5)


class Session:
    """Stands for a session in a context."""

    async def close(self) -> None:
        """Close nothing."""


class Side:
    """One backend, and the objects that the operations created with it.  Both sides number them in the same order."""

    def __init__(self, package: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.package = package
        self.backend = package._backend
        self._loop = loop
        self.contexts = [Context()]
        self.stores: list[Any] = []
        self.tokens: list[Any] = []
        self.sessions: list[Any] = [Session() for _ in range(6)]
        handler = self._prepare
        self.databases = [
            *(package.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(3)),
            package.DBConnect.from_url("sqlite+aiosqlite://", before_create_session_handler=handler),
        ]

    async def _prepare(self, _database: Any) -> None:
        await asyncio.sleep(0)

    def outcome(self, context: int, operation: Operation) -> object:
        """Run the operation in a task with this context, and describe its result in a form that both sides share."""

        async def run() -> object:
            result = operation(self)
            return await result if isinstance(result, Awaitable) else result

        task = self._loop.create_task(run(), context=self.contexts[context])
        try:
            return self.described(self._loop.run_until_complete(task))
        except Exception as error:
            return type(error).__name__, re.sub(r"0x[0-9a-f]+", "0x", str(error)), type(error.__cause__).__name__

    def described(self, value: Any) -> object:
        if isinstance(value, (list, tuple)):
            return [self.described(each) for each in value]
        if isinstance(value, (bool, int, str, type(None))):
            return value
        for name in ("databases", "stores", "tokens", "sessions"):
            known = getattr(self, name)
            for index, each in enumerate(known):
                if each is value:
                    return name, index
        if isinstance(value, self.backend.SessionStore):
            self.stores.append(value)
        elif isinstance(value, Token):
            self.tokens.append(value)
        else:
            self.sessions.append(value)
        return "new", type(value).__name__

    def everything(self) -> object:
        """Describe every context variable and every ``SessionStore``."""
        current = [self.described(each.run(self.backend.current_context)) for each in self.contexts]
        initiated = [each.run(self.package.is_context_initiated) for each in self.contexts]
        stores = [
            (
                store.closed,
                store.manual,
                store.read_only,
                len(store),
                repr(store),
                self.described(store.token),
                self.described(store.items()),
            )
            for store in self.stores
        ]
        return current, initiated, stores


class Machine(RuleBasedStateMachine):
    packages: dict[str, ModuleType]

    contexts = Bundle("contexts")
    stores = Bundle("stores")
    tokens = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._native, self._python = [Side(package, self._loop) for package in self.packages.values()]

    def teardown(self) -> None:
        self._loop.close()

    def both(self, context: int, operation: Operation) -> object:
        native, python = [side.outcome(context, operation) for side in (self._native, self._python)]
        assert native == python
        return native

    @invariant()
    def both_sides_are_equal(self) -> None:
        assert self._native.everything() == self._python.everything()

    @initialize(target=contexts)
    def first_context(self) -> int:
        return 0

    @rule(target=contexts, parent=st.none() | contexts)
    def copy_context(self, parent: int | None) -> int:
        for side in (self._native, self._python):
            side.contexts.append(Context() if parent is None else side.contexts[parent].copy())
        return len(self._native.contexts) - 1

    @rule(target=stores, context=contexts, manual=st.booleans(), read_only=st.booleans())
    def open_a_context(self, context: int, manual: bool, read_only: bool) -> int:
        self.both(context, lambda side: side.backend.open_context(manual, read_only))
        return len(self._native.stores) - 1

    @rule(target=tokens, context=contexts, force=st.booleans())
    def init(self, context: int, force: bool) -> Any:
        before = len(self._native.tokens)
        self.both(context, lambda side: side.package.init_db_session_ctx(force))
        return before if len(self._native.tokens) > before else multiple()

    @rule(target=stores, context=contexts)
    def current(self, context: int) -> Any:
        found = self.both(context, lambda side: side.backend.current_context())
        return found[1] if isinstance(found, tuple) and found[0] == "stores" else multiple()

    @rule(context=contexts, store=stores)
    def reset_a_context(self, context: int, store: int) -> None:
        self.both(context, lambda side: side.backend.reset_context(side.stores[store]))

    @rule(context=contexts, token=tokens, with_close=st.booleans())
    def reset(self, context: int, token: int, with_close: bool) -> None:
        self.both(context, lambda side: side.package.reset_db_session_ctx(side.tokens[token], with_close))

    @rule(context=contexts, db=DATABASES)
    def db_session(self, context: int, db: int) -> None:
        self.both(context, lambda side: side.package.db_session(side.databases[db]))

    @rule(context=contexts, db=DATABASES)
    def db_session_nowait(self, context: int, db: int) -> None:
        self.both(context, lambda side: side.package.db_session_nowait(side.databases[db]))

    @rule(context=contexts, db=DATABASES, session=SESSIONS)
    def put(self, context: int, db: int, session: int) -> None:
        self.both(
            context,
            lambda side: side.package.put_db_session_to_context(side.databases[db], side.sessions[session]),
        )

    @rule(
        context=contexts,
        db=DATABASES,
        name=st.sampled_from(["get_db_session_from_context", "pop_db_session_from_context", "close_db_session"]),
    )
    def one_session(self, context: int, db: int, name: str) -> None:
        self.both(context, lambda side: getattr(side.package, name)(side.databases[db]))

    @rule(context=contexts)
    def close_all(self, context: int) -> None:
        self.both(context, lambda side: side.package.close_all_sessions())

    @rule(store=stores, name=st.sampled_from(["close", "clear", "items"]))
    def store_operation(self, store: int, name: str) -> None:
        self.both(0, lambda side: getattr(side.stores[store], name)())

    @rule(store=stores, db=DATABASES, session=SESSIONS)
    def put_into_store(self, store: int, db: int, session: int) -> None:
        self.both(0, lambda side: side.stores[store].put(side.databases[db], side.sessions[session]))

    @rule(store=stores, db=DATABASES, name=st.sampled_from(["get", "pop"]))
    def one_session_of_store(self, store: int, db: int, name: str) -> None:
        self.both(0, lambda side: getattr(side.stores[store], name)(side.databases[db]))

    @rule(
        context=contexts,
        function=st.sampled_from(["db_session", "db_session_nowait", "init_db_session_ctx"]),
        wrong=st.sampled_from([None, "connection", 1]),
    )
    def wrong_argument(self, context: int, function: str, wrong: Any) -> None:
        if function == "init_db_session_ctx":
            self.both(context, lambda side: side.package.init_db_session_ctx(1, wrong))
        else:
            self.both(context, lambda side: getattr(side.package, function)(wrong))


def test_same_random_operations_have_the_same_results(packages: dict[str, dict[str, ModuleType]]) -> None:
    class Both(Machine):
        pass

    Both.packages = {backend: modules["ctxalchemy"] for backend, modules in packages.items()}
    run_state_machine_as_test(
        Both,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
