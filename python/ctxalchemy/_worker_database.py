"""A database for each pytest-xdist worker: a copy of a template that is migrated once in each run of pytest.

The name of each database contains its run.  A worker holds a shared lock on its run until it ends.  The server or the
operating system releases this lock even if the process is killed.  A run whose lock nobody holds is over.  Each worker
drops the databases of all runs that are over, when it starts and when it ends.  Therefore, the last worker of a run
drops the databases of its run, and a later run drops those of a run that was killed.

One exclusive lock for each base database makes sure that workers create and drop databases one after another.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import re
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from ._url import parse_url

T = TypeVar("T")
Migrate = Callable[[URL], Awaitable[None] | None]

_OBJECT_IN_USE = "55006"
_SECONDS_FOR_A_MIGRATION = 3600.0  # How long a worker waits for the SQLite lock.


@pytest.fixture(scope="session")
def base_database_url() -> str | URL:
    """The URL of an existing PostgreSQL database, or of an SQLite file.  Override this fixture."""
    raise pytest.UsageError(
        'define a fixture base_database_url with scope="session" in conftest.py: it returns the URL of an existing '
        "PostgreSQL database or of an SQLite file, and worker_database creates its databases beside it"
    )


@pytest.fixture(scope="session")
def migrate_database() -> Migrate:
    """A function that creates the tables in the database of a URL.  Override this fixture."""
    raise pytest.UsageError(
        'define a fixture migrate_database with scope="session" in conftest.py: it returns a function or an async '
        "function that takes the URL of a new database and creates the tables in it"
    )


@pytest.fixture(scope="session")
def worker_database(
    request: pytest.FixtureRequest, base_database_url: str | URL, migrate_database: Migrate
) -> Iterator[URL]:
    """The URL of a migrated database that only this pytest-xdist worker uses.  It is dropped after the tests.

    The fixture returns a ``URL`` because pytest shows the repr of a fixture when a test fails, and the repr of a
    ``URL`` does not contain the password.
    """
    worker = getattr(request.config, "workerinput", {"testrunuid": uuid4().hex, "workerid": "main"})
    databases = _databases(parse_url(base_database_url))
    run = _digest(worker["testrunuid"])[:12]
    with _in_another_thread(_database_of_worker(databases, run, worker["workerid"], migrate_database)) as url:
        yield url


@contextmanager
def _in_another_thread(manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter and exit an async context manager in a thread of its own, because this one may run an event loop."""
    with ThreadPoolExecutor(1) as thread:
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        try:
            yield thread.submit(runner.run, manager.__aenter__()).result()
            thread.submit(runner.run, manager.__aexit__(None, None, None)).result()
        finally:
            thread.submit(runner.close).result()


@asynccontextmanager
async def _database_of_worker(databases: _Databases, run: str, worker: str, migrate: Migrate) -> AsyncIterator[URL]:
    async with databases.connected():
        async with databases.exclusive():
            await _drop_databases_of_runs_that_are_over(databases)
            await databases.join(run)
        try:
            async with databases.exclusive():
                await _copy_template(databases, run, worker, migrate)
            yield databases.url(f"{run}_{worker}")
        except BaseException as error:  # Also if pytest is interrupted while this fixture is set up.
            try:
                await _leave(databases, run)
            except Exception as later:
                error.add_note(f"the databases of this run could not be dropped: {type(later).__name__}")
            raise
        await _leave(databases, run)


async def _copy_template(databases: _Databases, run: str, worker: str, migrate: Migrate) -> None:
    template, unfinished = f"{run}_template", f"{run}_unfinished"
    if not await databases.exists(template):
        await databases.drop(unfinished)  # A worker of this run may have been killed while it migrated.
        await databases.create(unfinished)
        # In a thread without an event loop: the env.py of Alembic may call asyncio.run.
        migration = await asyncio.to_thread(migrate, databases.url(unfinished))
        if inspect.isawaitable(migration):
            await migration
        await databases.rename(unfinished, template)
    await databases.copy(template, f"{run}_{worker}")


async def _leave(databases: _Databases, run: str) -> None:
    async with databases.exclusive():
        await databases.leave(run)
        await _drop_databases_of_runs_that_are_over(databases)


async def _drop_databases_of_runs_that_are_over(databases: _Databases) -> None:
    for name in await databases.names():
        if await databases.is_over(name[:12]):
            await databases.drop(name)


def _databases(base: URL) -> _Databases:
    if base.get_backend_name() == "postgresql" and base.database:
        return _PostgreSQL(base)
    if base.get_backend_name() == "sqlite" and base.database not in (None, "", ":memory:") and "uri" not in base.query:
        return _SQLite(base)
    raise pytest.UsageError(
        "worker_database needs the URL of a PostgreSQL database or of an SQLite file: the fixture base_database_url "
        f"returned a URL of {base.get_backend_name()}"
        + (" without a file" if base.get_backend_name() == "sqlite" else "")
        + (" without a database" if base.get_backend_name() == "postgresql" else "")
    )


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def _still_open() -> pytest.UsageError:
    return pytest.UsageError(
        "the function of the fixture migrate_database has left a connection to the new database open: "
        "close the DBConnect or dispose of the engine before the function returns"
    )


class _Databases(ABC):
    """The databases of all runs for one base database.  A name is ``{run}_{purpose}``, and a run has 12 characters."""

    def __init__(self, base: URL) -> None:
        self._base = base

    @abstractmethod
    def connected(self) -> AbstractAsyncContextManager[None]: ...
    @abstractmethod
    def exclusive(self) -> AbstractAsyncContextManager[None]: ...
    @abstractmethod
    async def join(self, run: str) -> None: ...
    @abstractmethod
    async def leave(self, run: str) -> None: ...
    @abstractmethod
    async def is_over(self, run: str) -> bool: ...
    @abstractmethod
    async def names(self) -> list[str]: ...
    @abstractmethod
    def url(self, name: str) -> URL: ...
    @abstractmethod
    async def create(self, name: str) -> None: ...
    @abstractmethod
    async def copy(self, source: str, name: str) -> None: ...
    @abstractmethod
    async def rename(self, name: str, new: str) -> None: ...
    @abstractmethod
    async def drop(self, name: str) -> None: ...

    async def exists(self, name: str) -> bool:
        return name in await self.names()


class _PostgreSQL(_Databases):
    """Databases on the server of the base database.  The locks are advisory locks of one connection to the base."""

    _connection: AsyncConnection

    def __init__(self, base: URL) -> None:
        super().__init__(base)
        # PostgreSQL cuts names off after 63 bytes.  The digest keeps the names of similar base databases apart.
        name = str(base.database)
        self._prefix = f"{re.sub('[^a-z0-9]', '_', name.lower())[:24]}_{_digest(name)[:8]}_"

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        engine = create_async_engine(self._base, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        async with engine.connect() as self._connection:
            yield

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        await self._lock("pg_advisory_lock", self._prefix)
        try:
            yield
        finally:
            await self._lock("pg_advisory_unlock", self._prefix)

    async def join(self, run: str) -> None:
        await self._lock("pg_advisory_lock_shared", self._prefix + run)

    async def leave(self, run: str) -> None:
        await self._lock("pg_advisory_unlock_shared", self._prefix + run)

    async def is_over(self, run: str) -> bool:
        over = await self._lock("pg_try_advisory_lock", self._prefix + run)
        if over:
            await self._lock("pg_advisory_unlock", self._prefix + run)
        return over

    async def _lock(self, function: str, name: str) -> bool:
        key = int(_digest(name)[:15], 16)
        return bool(await self._connection.scalar(text(f"SELECT {function}({key})")))

    async def names(self) -> list[str]:
        found = await self._connection.scalars(
            text("SELECT datname FROM pg_database WHERE starts_with(datname::text, :prefix)"), {"prefix": self._prefix}
        )
        return [str(name).removeprefix(self._prefix) for name in found]

    def url(self, name: str) -> URL:
        return self._base.set(database=self._prefix + name)

    async def create(self, name: str) -> None:
        await self._connection.execute(text(f'CREATE DATABASE "{self._prefix}{name}"'))

    async def copy(self, source: str, name: str) -> None:
        await self._connection.execute(
            text(f'CREATE DATABASE "{self._prefix}{name}" TEMPLATE "{self._prefix}{source}"')
        )

    async def rename(self, name: str, new: str) -> None:
        try:
            await self._connection.execute(
                text(f'ALTER DATABASE "{self._prefix}{name}" RENAME TO "{self._prefix}{new}"')
            )
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _OBJECT_IN_USE:
                raise _still_open() from error
            raise

    async def drop(self, name: str) -> None:
        await self._connection.execute(text(f'DROP DATABASE IF EXISTS "{self._prefix}{name}" WITH (FORCE)'))


class _SQLite(_Databases):
    """Files in a folder beside the base file.  The locks are SQLite's own locks on empty databases."""

    _joined: sqlite3.Connection

    def __init__(self, base: URL) -> None:
        super().__init__(base)
        self._folder = Path(f"{base.database}.workers").resolve()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        self._folder.mkdir(exist_ok=True)
        yield

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        with self._open("lock") as lock:
            lock.execute("BEGIN EXCLUSIVE")
            yield

    async def join(self, run: str) -> None:
        self._joined = sqlite3.connect(self._folder / f"{run}_lock", isolation_level=None)
        self._joined.execute("BEGIN")
        self._joined.execute("SELECT * FROM sqlite_master").fetchall()  # Only a statement takes the shared lock.

    async def leave(self, run: str) -> None:
        self._joined.close()

    async def is_over(self, run: str) -> bool:
        if not (self._folder / f"{run}_lock").exists():
            return True  # The lock of a run is dropped with its other files.
        with self._open(f"{run}_lock", timeout=0) as lock:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                return False
            return True

    def _open(self, name: str, timeout: float = _SECONDS_FOR_A_MIGRATION) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(self._folder / name, timeout=timeout, isolation_level=None))

    async def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if re.match("[0-9a-f]{12}_", path.name)]

    def url(self, name: str) -> URL:
        return self._base.set(database=str(self._folder / name))

    async def create(self, name: str) -> None:
        (self._folder / name).touch()

    async def copy(self, source: str, name: str) -> None:
        shutil.copyfile(self._folder / source, self._folder / name)

    async def rename(self, name: str, new: str) -> None:
        if any((self._folder / f"{name}{suffix}").exists() for suffix in ("-wal", "-journal")):
            raise _still_open()
        (self._folder / name).rename(self._folder / new)

    async def drop(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)
