"""The public names and their signatures.  The names of parameters are part of the API."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

MIDDLEWARE = "(app, before_commit=None, *, commit_if=None, read_only_if=None, websocket=False)"
SIGNATURES = {
    "ctxalchemy": {
        "DBConnect": "(engine_creator, session_maker_creator, host=None, before_create_session_handler=None, "
        "*, required_settings=(), warn_held=None, read_only_engine_creator=None, read_only_host=None)",
        "DBConnect.from_url": (
            "(url, *, before_create_session_handler=None, session_class=<class "
            "'sqlalchemy.ext.asyncio.session.AsyncSession'>, session_options=None, required_settings=(), "
            "warn_held=None, read_only_host=None, **engine_options)"
        ),
        "DBConnect.connect": "(self, host)",
        "DBConnect.change_host": "(self, host)",
        "DBConnect.change_read_only_host": "(self, host)",
        "DBConnect.create_session": "(self)",
        "DBConnect.session_maker": "(self)",
        "DBConnect.engine": "(self)",
        "DBConnect.close": "(self)",
        "db_session": "(connect)",
        "db_session_nowait": "(connect)",
        "atomic_db_session": "(connect, current_transaction='commit')",
        "commit_db_session": "(connect)",
        "rollback_db_session": "(connect)",
        "close_db_session": "(connect)",
        "new_non_ctx_session": "(connect)",
        "new_non_ctx_atomic_session": "(connect)",
        "init_db_session_ctx": "(force=False)",
        "is_context_initiated": "()",
        "reset_db_session_ctx": "(token, with_close=True)",
        "get_db_session_from_context": "(connect)",
        "put_db_session_to_context": "(connection, session)",
        "pop_db_session_from_context": "(connect)",
        "run_in_new_ctx": "(callable_func, *args, **kwargs)",
        "new_ctx": "(*, read_only=False)",
        "in_new_ctx": "(callable_func=None, /, *, attempts=1, read_only=False)",
        "commit_all_sessions": "(before_commit=None)",
        "rollback_all_sessions": "()",
        "close_all_sessions": "()",
        "on_commit": "(connect, callback)",
        "on_rollback": "(connect, callback)",
        "auto_commit_by_status_code": "(status_code, before_commit=None)",
        "set_local": "(connect, settings)",
        "ASGIHTTPDBSessionMiddleware": MIDDLEWARE,
    },
    "ctxalchemy.starlette": {
        "StarletteHTTPDBSessionMiddleware": MIDDLEWARE,
        "add_starlette_http_db_session_middleware": MIDDLEWARE,
        "starlette_http_db_session_middleware": "(request, call_next, before_commit=None)",
    },
    "ctxalchemy.fastapi": {
        "add_fastapi_http_db_session_middleware": MIDDLEWARE,
        "fastapi_http_db_session_middleware": "(request, call_next, before_commit=None)",
    },
    "ctxalchemy.testing": {
        "rollback_session": "(connection)",
        "set_test_context": "(auto_close=False)",
        "put_savepoint_session_in_ctx": "(connection, session)",
        "allow_real_commits": "(connection)",
    },
}
ERRORS = {
    "ContextNotInitiatedError": "RuntimeError",
    "ContextClosedError": "ContextNotInitiatedError",
    "ContextAlreadyInitiatedError": "RuntimeError",
    "SessionNotReadyError": "RuntimeError",
    "MissingSettingsError": "RuntimeError",
    "PartialCommitError": "RuntimeError",
}
TYPES = {"BeforeCommitCallback", "CommitIf", "CurrentTransaction", "ReadOnlyIf"}
COROUTINE_FUNCTIONS = [
    "DBConnect.connect",
    "DBConnect.change_host",
    "DBConnect.change_read_only_host",
    "DBConnect.create_session",
    "DBConnect.session_maker",
    "DBConnect.close",
    "db_session",
    "commit_db_session",
    "rollback_db_session",
    "close_db_session",
    "reset_db_session_ctx",
    "run_in_new_ctx",
    "commit_all_sessions",
    "rollback_all_sessions",
    "close_all_sessions",
    "auto_commit_by_status_code",
    "set_local",
]


def names_of(module: str) -> set[str]:
    names = {name for name in SIGNATURES[module] if "." not in name}
    if module == "ctxalchemy":
        return names | ERRORS.keys() | TYPES | {"BACKEND"}
    return names | {"SharedTransactionWarning"} if module == "ctxalchemy.testing" else names


def without_annotations(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("module", SIGNATURES)
def test_public_names_are_as_listed(ctxalchemy: ModuleType, module: str) -> None:
    assert set(import_module(module).__all__) == names_of(module)


@pytest.mark.parametrize("module", SIGNATURES)
def test_every_public_name_can_be_imported(ctxalchemy: ModuleType, module: str) -> None:
    assert {name for name in names_of(module) if not hasattr(import_module(module), name)} == set()


@pytest.mark.parametrize("module", SIGNATURES)
def test_signatures_are_as_listed(ctxalchemy: ModuleType, module: str) -> None:
    found = {name: without_annotations(attrgetter(name)(import_module(module))) for name in SIGNATURES[module]}
    assert found == SIGNATURES[module]


def test_errors_have_the_listed_bases(ctxalchemy: ModuleType) -> None:
    assert {name: getattr(ctxalchemy, name).__base__.__name__ for name in ERRORS} == ERRORS


@pytest.mark.parametrize("name", COROUTINE_FUNCTIONS)
def test_every_function_that_is_awaited_is_a_coroutine_function(ctxalchemy: ModuleType, name: str) -> None:
    assert inspect.iscoroutinefunction(attrgetter(name)(ctxalchemy))


@pytest.mark.parametrize("name", sorted(names_of("ctxalchemy") - TYPES - {"BACKEND"}))
def test_every_public_object_names_the_package_as_its_module_and_has_a_docstring(
    ctxalchemy: ModuleType, name: str
) -> None:
    public = getattr(ctxalchemy, name)
    assert (public.__module__, public.__name__, public.__qualname__) == ("ctxalchemy", name, name)
    assert public.__doc__


def test_version_is_that_of_the_installed_distribution(ctxalchemy: ModuleType) -> None:
    assert ctxalchemy.__version__ == version("ctxalchemy")


def test_starlette_middleware_is_the_asgi_middleware(ctxalchemy: ModuleType) -> None:
    assert ctxalchemy.starlette.StarletteHTTPDBSessionMiddleware is ctxalchemy.ASGIHTTPDBSessionMiddleware


async def test_functions_accept_their_arguments_by_name(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect.from_url(url="sqlite+aiosqlite://")
    token = ctxalchemy.init_db_session_ctx(force=True)
    session = await ctxalchemy.db_session(connect=db)
    assert ctxalchemy.db_session_nowait(connect=db) is session
    assert ctxalchemy.get_db_session_from_context(connect=db) is session
    await ctxalchemy.reset_db_session_ctx(token=token, with_close=True)


@pytest.mark.parametrize("name", ["db_session", "db_session_nowait", "init_db_session_ctx", "is_context_initiated"])
def test_wrong_arguments_are_refused_at_the_call(ctxalchemy: ModuleType, name: str) -> None:
    function = getattr(ctxalchemy, name)
    with pytest.raises(TypeError):
        function(1, 2)
    with pytest.raises(TypeError):
        function(unknown=1)
    assert not ctxalchemy.is_context_initiated()
