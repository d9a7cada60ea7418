"""The libraries that are compared: both backends of ctxalchemy in one process, and the peers (other libraries).

Only public names of the peers are used.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from types import ModuleType
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from .measure import warn

NATIVE = "ctxalchemy native"
PURE_PYTHON = "ctxalchemy pure Python"
PEER = "context-async-sqlalchemy"
PEER_STARLETTE = "context-async-sqlalchemy (BaseHTTPMiddleware)"
SCOPED = "async_scoped_session"
FASTAPI_ASYNC = "fastapi-async-sqlalchemy"
ADVANCED = "advanced-alchemy"
HAND_WRITTEN = "hand-written sessions"
BARE = "bare application"

# Ways to serve a request that are only measured over HTTP.
NO_DATABASE = "no database"
DEPENDS = "hand-written sessions with Depends"
PEER_FASTAPI = f"{PEER} (FastAPI helper)"
NATIVE_READ_ONLY = f"{NATIVE}, read-only"
PURE_PYTHON_READ_ONLY = f"{PURE_PYTHON}, read-only"

PEER_PACKAGE = "context_async_sqlalchemy"

# The value of CTXALCHEMY_BACKEND for each of our libraries.
BACKEND_OF = {NATIVE: "native", PURE_PYTHON: "python"}


@cache
def contextual() -> dict[str, ModuleType]:
    """Return the installed libraries that have the interface of ctxalchemy, by name."""
    found = {name: package for name in (PURE_PYTHON, NATIVE) if (package := _load(BACKEND_OF[name]))}
    try:
        found[PEER] = importlib.import_module(PEER_PACKAGE)
    except ModuleNotFoundError:
        warn(f"{PEER} is not installed: ctxalchemy is not compared with it")
    return found


def backends() -> list[str]:
    """Return the backends of ctxalchemy that are installed."""
    return [BACKEND_OF[name] for name in contextual() if name in BACKEND_OF]


def create_database(package: ModuleType, url: str, **options: Any) -> Any:
    """Return a database (``DBConnect``) of this library; it is configured alike for all libraries.

    The engine of the read-only contexts, which only ctxalchemy has, is configured like the other one.
    """

    def create(_host: str) -> AsyncEngine:
        return create_engine(url, **options)

    read_only = {} if package.__name__ == PEER_PACKAGE else {"read_only_engine_creator": create}
    return package.DBConnect(create, create_session_maker, "localhost", **read_only)


def create_engine(url: str, **options: Any) -> AsyncEngine:
    """Return an engine; all libraries use engines from this function."""
    return create_async_engine(url, **options)


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Return a session maker; all libraries use session makers from this function."""
    return async_sessionmaker(engine, expire_on_commit=False)


def _load(backend: str) -> ModuleType | None:
    """Import a copy of ctxalchemy with this backend.

    Load the pure-Python backend first and the native backend last: the last copy stays in ``sys.modules``,
    and the Rust code may import from there.
    """
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "ctxalchemy"}
    for name in before:
        del sys.modules[name]
    previous = os.environ.get("CTXALCHEMY_BACKEND")
    os.environ["CTXALCHEMY_BACKEND"] = backend
    try:
        return importlib.import_module("ctxalchemy")
    except ModuleNotFoundError as error:
        warn(f"the {backend} backend is not installed ({error}): it is not measured")
        sys.modules.update(before)
        return None
    finally:
        del os.environ["CTXALCHEMY_BACKEND"]
        if previous is not None:
            os.environ["CTXALCHEMY_BACKEND"] = previous
