"""What ``DBConnect.from_url`` does with a URL: check it, replace its host, and share a database in memory."""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

DEFAULT_HOST = "localhost"
_HOST_AND_PORT = re.compile(r"([A-Za-z0-9.-]+):(\d+)")
_POOL_OPTIONS = frozenset({"poolclass", "pool", "async_creator", "creator"})

_ASYNC_DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+aiomysql",
    "mariadb": "mariadb+aiomysql",
    "sqlite": "sqlite+aiosqlite",
}


def parse_url(url: str | URL) -> URL:
    """Return the URL.  Its driver must be async.

    Raises:
        TypeError: this is not a URL.
        sqlalchemy.exc.ArgumentError: the URL cannot be parsed, or its driver is unknown or synchronous.
    """
    if not isinstance(url, (str, URL)):
        raise TypeError(f"url must be a string or a sqlalchemy.URL, not {type(url).__name__}: pass str(url)")
    parsed = make_url(url)
    if not parsed.get_dialect().get_async_dialect_cls(parsed).is_async:
        recommended = _ASYNC_DRIVERS.get(parsed.get_backend_name())
        raise ArgumentError(
            f"the driver of this URL ({parsed.drivername}) is synchronous: use an async driver"
            + (f", for example {recommended}" if recommended else "")
        )
    return parsed


# --- the host ----------------------------------------------------------------------------------------


def host_in(url: URL) -> str:
    """Return the host in the URL, which is in the query or before the path.  If there is none, "localhost"."""
    given = url.query.get("host") or url.host or DEFAULT_HOST
    if not isinstance(given, str):
        return ",".join(given)
    return _split(url, given)[0]


def replace_host(url: URL, host: str) -> URL:
    """Return the URL with another host.  The port stays.

    Raises:
        ValueError: the URL has no single host that could be replaced.
    """
    given = url.query.get("host") or url.host or ""
    if url.get_backend_name() == "sqlite":
        raise _not_replaceable("SQLite has no hosts")
    if not isinstance(given, str) or "," in given:
        raise _not_replaceable("it contains several hosts")
    if given.startswith(("/", "@")) or "unix_socket" in url.query:
        raise _not_replaceable("it contains a Unix socket")
    if "host" not in url.query:
        return url.set(host=host)
    _, port = _split(url, given)
    return url.update_query_dict({"host": host} | ({"port": port} if port else {}))


def _split(url: URL, given: str) -> tuple[str, str | None]:
    """Split a host in the query, as SQLAlchemy does: it may contain a port."""
    match = _HOST_AND_PORT.fullmatch(given)
    if match is None or "port" in url.query:
        return given, None
    return match[1], match[2]


def _not_replaceable(reason: str) -> ValueError:
    return ValueError(f"the host in the URL cannot be changed: {reason}; use DBConnect with an engine_creator")


# --- SQLite in memory --------------------------------------------------------------------------------


def shared_memory_url(url: URL, options: dict[str, Any]) -> URL | None:
    """Return the URL of a new database in memory that several connections can share, if this URL is one in memory.

    SQLAlchemy uses one connection for all sessions of such a URL: a rollback of one session undoes the work of the
    others, and the database ends with the connection.  SQLite before 3.36 cannot do better.
    """
    if not _is_in_memory(url) or _POOL_OPTIONS & set(options) or sqlite3.sqlite_version_info < (3, 36):
        return None
    # Connections of this process that open the same name share the database: https://sqlite.org/src/file/src/memdb.c
    return url.set(database=f"file:/ctxalchemy-{uuid4().hex}").update_query_dict({"uri": "true", "vfs": "memdb"})


def can_share(url: URL, options: dict[str, Any]) -> bool:
    """Return whether a second engine with this URL and these options uses the same database, in a pool of its own."""
    return "pool" not in options and (not _is_in_memory(url) or shared_memory_url(url, options) is not None)


def _is_in_memory(url: URL) -> bool:
    in_memory = url.drivername == "sqlite+aiosqlite" and url.database in (None, "", ":memory:")
    return in_memory and "uri" not in url.query


def create_memory_engine(url: URL, options: dict[str, Any]) -> AsyncEngine:
    """Create the engine for a URL of ``shared_memory_url``.

    The database exists as long as a connection to it is open.  Therefore the engine has one that no session uses,
    from the first use until the engine is disposed of.
    """
    engine = create_async_engine(url, **options)

    @event.listens_for(engine.sync_engine, "connect", once=True)
    def keep(*_: object) -> None:
        keeper = sqlite3.connect(f"{url.database}?vfs=memdb", uri=True, check_same_thread=False)
        event.listen(engine.sync_engine, "engine_disposed", lambda _: keeper.close())

    return engine
