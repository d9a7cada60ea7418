"""The libraries that are compared: both backends of ctxalchemy in one process, and the peers.

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

from .measure import loudly

NATIVE = "ctxalchemy native"
PYTHON = "ctxalchemy python"
PEER = "context-async-sqlalchemy"
PEER_HELPER = "context-async-sqlalchemy (BaseHTTPMiddleware)"
SCOPED = "async_scoped_session"
FASTAPI_ASYNC = "fastapi-async-sqlalchemy"
ADVANCED = "advanced-alchemy"
BY_HAND = "by hand"
BARE = "bare application"

# The ways to serve over HTTP that are not libraries.
NO_DATABASE = "no database"
DEPENDS = "by hand with Depends"
PEER_FASTAPI = f"{PEER} (FastAPI helper)"

OURS = {NATIVE: "native", PYTHON: "python"}


@cache
def contextual() -> dict[str, ModuleType]:
    """The libraries with the interface of ctxalchemy, by name; without those that are not installed here."""
    found = {name: package for name in (PYTHON, NATIVE) if (package := _load(OURS[name]))}
    try:
        found[PEER] = importlib.import_module("context_async_sqlalchemy")
    except ModuleNotFoundError:
        loudly(f"{PEER} is not installed: there is nothing to compare with")
    return found


def backends() -> list[str]:
    """The backends of ctxalchemy that are here."""
    return [OURS[name] for name in contextual() if name in OURS]


def connect(package: ModuleType, url: str, **options: Any) -> Any:
    """A connection of this library, made the same way for all."""
    return package.DBConnect(lambda _host: create_engine(url, **options), create_session_maker, "localhost")


def create_engine(url: str, **options: Any) -> AsyncEngine:
    """The engine that all of them use."""
    return create_async_engine(url, **options)


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """The session maker that all of them use."""
    return async_sessionmaker(engine, expire_on_commit=False)


def _load(backend: str) -> ModuleType | None:
    """Import a copy of ctxalchemy with this backend.

    The Python one comes first: the copy that stays in ``sys.modules`` is the native one, whose Rust
    code may look there.
    """
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "ctxalchemy"}
    for name in before:
        del sys.modules[name]
    chosen = os.environ.get("CTXALCHEMY_BACKEND")
    os.environ["CTXALCHEMY_BACKEND"] = backend
    try:
        return importlib.import_module("ctxalchemy")
    except ModuleNotFoundError as error:
        loudly(f"the {backend} backend is not here ({error}): it is not measured")
        sys.modules.update(before)
        return None
    finally:
        del os.environ["CTXALCHEMY_BACKEND"]
        if chosen is not None:
            os.environ["CTXALCHEMY_BACKEND"] = chosen
