"""Arguments of the wrong type are described by their type: an argument may be a URL with a password."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType

URL = "postgresql+asyncpg://app:secret@localhost/app"


class SettingsURL:
    """A URL object of a settings library."""

    def __repr__(self) -> str:
        return f"SettingsURL({URL!r})"


async def use(manager: Any) -> None:
    async with manager:
        pass


async def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    function(*arguments, **options)


def nothing(*_: Any) -> None: ...


MISTAKES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "db_session": lambda c: c.db_session(URL),
    "db_session_nowait": lambda c: call(c.db_session_nowait, URL),
    "atomic_db_session": lambda c: use(c.atomic_db_session(URL)),
    "put_db_session_to_context": lambda c: call(c.put_db_session_to_context, URL, object()),
    "new_non_ctx_session": lambda c: use(c.new_non_ctx_session(URL)),
    "new_non_ctx_atomic_session": lambda c: use(c.new_non_ctx_atomic_session(URL)),
    "rollback_session": lambda c: use(c.testing.rollback_session(URL)),
    "put_savepoint_session_in_ctx": lambda c: use(c.testing.put_savepoint_session_in_ctx(URL, object())),
    "reset_db_session_ctx": lambda c: c.reset_db_session_ctx(URL),
    "run_in_new_ctx": lambda c: c.run_in_new_ctx(partial(str, URL)),
    "run_in_new_ctx of no function": lambda c: c.run_in_new_ctx(URL),
    "before_commit": lambda c: call(c.ASGIHTTPDBSessionMiddleware, nothing, URL),
    "current_transaction": lambda c: call(c.atomic_db_session, None, URL),
    "from_url": lambda c: call(c.DBConnect.from_url, SettingsURL()),
    "reset_context": lambda c: call(c._backend.reset_context, URL),
    "commit_if": lambda c: call(c.ASGIHTTPDBSessionMiddleware, nothing, commit_if=URL),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_url_in_the_wrong_place_does_not_appear_in_the_error(ctxalchemy: ModuleType, mistake: str) -> None:
    async def run() -> None:
        token = ctxalchemy.init_db_session_ctx()
        try:
            await MISTAKES[mistake](ctxalchemy)
        finally:
            await ctxalchemy.reset_db_session_ctx(token)

    with pytest.raises((TypeError, ValueError, AttributeError)) as caught:
        await run()
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in str(error)
        assert "secret" not in repr(error)
        error = error.__context__


@pytest.mark.parametrize("mistake", ["db_session", "db_session_nowait", "put_db_session_to_context"])
async def test_the_error_names_the_type_that_was_passed(ctxalchemy: ModuleType, mistake: str) -> None:
    token = ctxalchemy.init_db_session_ctx()
    with pytest.raises(TypeError, match=r"^expected a DBConnect, got str$"):
        await MISTAKES[mistake](ctxalchemy)
    await ctxalchemy.reset_db_session_ctx(token)


async def test_the_error_for_a_context_names_the_type_that_was_passed(ctxalchemy: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"^expected a SessionStore, got str$"):
        await MISTAKES["reset_context"](ctxalchemy)


async def test_the_error_for_a_url_names_the_type_that_was_passed(ctxalchemy: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"^url must be a string or a sqlalchemy.URL, not SettingsURL: "):
        await MISTAKES["from_url"](ctxalchemy)


@pytest.mark.parametrize("host", [URL, "host=db password=secret", URL.replace(":secret@", "@") + "?password=secret"])
def test_a_url_as_the_host_does_not_appear_in_the_repr(ctxalchemy: ModuleType, host: str) -> None:
    """An ``engine_creator`` of the application may take anything as its host."""
    db = ctxalchemy.DBConnect(nothing, nothing, host)
    assert repr(db) == "<DBConnect host='***', not connected>"


@pytest.mark.parametrize("host", ["db-1.example.com", "10.0.0.1:5432", "[::1]:5432", "a,b", "/var/run/pg", None])
def test_a_host_appears_in_the_repr(ctxalchemy: ModuleType, host: str | None) -> None:
    assert repr(ctxalchemy.DBConnect(nothing, nothing, host)) == f"<DBConnect host={host!r}, not connected>"
