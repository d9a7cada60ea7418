"""Serve one FastAPI application on uvicorn: ``python -m bench.http_server WAY`` prints the port it listens on."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from . import libraries
from .libraries import (
    ADVANCED,
    DEPENDS,
    FASTAPI_ASYNC,
    HAND_WRITTEN,
    NATIVE,
    NATIVE_READ_ONLY,
    NO_DATABASE,
    PEER,
    PEER_FASTAPI,
    PURE_PYTHON,
    PURE_PYTHON_READ_ONLY,
)
from .measure import pin

QUERY = text("SELECT 1")
POOL = {"pool_size": 20, "max_overflow": 0}


def no_database(app: FastAPI) -> None:
    """Respond without a database."""

    @app.get("/")
    async def index() -> dict[str, Any]:
        return {"value": 1}


def session_in_handler(app: FastAPI) -> None:
    """Open the session and the transaction in the handler."""
    maker = _session_maker()

    @app.get("/")
    async def index() -> dict[str, Any]:
        async with maker() as session, session.begin():
            value = await session.scalar(QUERY)
        return {"value": value}


def depends(app: FastAPI) -> None:
    """Open the session and the transaction in a dependency."""
    maker = _session_maker()

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with maker() as session, session.begin():
            yield session

    _add_route(app, get_session)


def contextual(app: FastAPI, package_name: str, *, helper: bool = False, **options: Any) -> None:
    """Use the session of the context: ctxalchemy or context-async-sqlalchemy; the options go to the middleware."""
    package = importlib.import_module(package_name)
    db = libraries.create_database(package, _url(), **POOL)
    db_session = package.db_session
    if helper:
        importlib.import_module(f"{package_name}.fastapi_utils").add_fastapi_http_db_session_middleware(app)
    else:
        app.add_middleware(package.ASGIHTTPDBSessionMiddleware, **options)

    @app.get("/")
    async def index() -> dict[str, Any]:
        session = await db_session(db)
        return {"value": await session.scalar(QUERY)}


def fastapi_async(app: FastAPI) -> None:
    """Use fastapi-async-sqlalchemy."""
    from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

    engine = libraries.create_engine(_url(), **POOL)
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)

    @app.get("/")
    async def index() -> dict[str, Any]:
        return {"value": await db.session.scalar(QUERY)}


def advanced(app: FastAPI) -> None:
    """Use advanced-alchemy."""
    from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, AsyncSessionConfig, SQLAlchemyAsyncConfig

    config = SQLAlchemyAsyncConfig(
        engine_instance=libraries.create_engine(_url(), **POOL),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    )
    _add_route(app, AdvancedAlchemy(config, app).provide_session())


WAYS: dict[str, Callable[[FastAPI], None]] = {
    NO_DATABASE: no_database,
    HAND_WRITTEN: session_in_handler,
    DEPENDS: depends,
    PEER_FASTAPI: lambda app: contextual(app, "context_async_sqlalchemy", helper=True),
    PEER: lambda app: contextual(app, "context_async_sqlalchemy"),
    ADVANCED: advanced,
    FASTAPI_ASYNC: fastapi_async,
    NATIVE: lambda app: contextual(app, "ctxalchemy"),
    PURE_PYTHON: lambda app: contextual(app, "ctxalchemy"),
    NATIVE_READ_ONLY: lambda app: contextual(app, "ctxalchemy", read_only_if=_always),
    PURE_PYTHON_READ_ONLY: lambda app: contextual(app, "ctxalchemy", read_only_if=_always),
}


def _add_route(app: FastAPI, get_session: Callable[..., Any]) -> None:
    async def index(session: Any) -> dict[str, Any]:
        return {"value": await session.scalar(QUERY)}

    index.__annotations__["session"] = Annotated[AsyncSession, Depends(get_session)]
    app.get("/")(index)


def _always(_scope: Any) -> bool:
    return True


def _session_maker() -> async_sessionmaker[AsyncSession]:
    return libraries.create_session_maker(libraries.create_engine(_url(), **POOL))


def _url() -> str:
    return os.environ["TEST_DATABASE_URL"]


def main() -> None:
    """Serve until the process is terminated."""
    pin(0)
    app = FastAPI()
    WAYS[sys.argv[1]](app)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", access_log=False, log_level="warning", lifespan="on")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
