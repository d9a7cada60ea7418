"""The transaction settings of each context: what ``set_local`` has set, and what nested contexts inherit.

A context is only in ``contexts`` if it has settings, or a session of a database that requires some.  Everything else
only checks whether ``contexts`` is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ._by_context import ByContext
from ._sqlalchemy import is_async_session
from ._sqlalchemy.internals import connections_of, greenlet_spawn
from ._sqlalchemy.settings import Settings, SettingsListener, check_dialect

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_KEY = "ctxalchemy: settings"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")

_NO_SETTINGS = Settings(None, (), {})

contexts: ByContext[dict[int, Settings]] = ByContext()
"""For each context, its settings for each database, by the id of the database."""


def attach(store: object, database: object, session: AsyncSession, required: tuple[str, ...]) -> None:
    """Apply the settings of the context to each transaction of this session.

    Args:
        store: the context.
        database: the database.
        session: a session that is put into the context.  If the session is in a transaction, the settings are applied
            before the next statement of the session.
        required: the names of the settings without which no transaction of the database may begin.
    """
    if required or id(database) in (contexts.of(store) or {}):
        listener = _listener(session, _settings_of(store, database, required))
        if listener is not None:
            listener.apply_later(session.sync_session)


def detach(session: AsyncSession) -> None:
    """Apply the settings of an earlier context to no later transaction of this session."""
    if is_async_session(session) and (listener := session.sync_session.info.get(_KEY)) is not None:
        listener.settings = _NO_SETTINGS


async def apply(
    store: object, database: object, session: AsyncSession, required: tuple[str, ...], values: Mapping[str, str]
) -> None:
    """Add settings to the context.  If the session has a connection checked out, apply them at once.

    If that fails, the context keeps the settings that it had before.
    """
    if is_async_session(session) and (bind := session.sync_session.bind) is not None:
        check_dialect(bind.dialect.name)
    settings = _settings_of(store, database, required)
    listener = _listener(session, settings)
    former = {name: settings.values.get(name) for name in values}
    # This comes first, for a transaction that another task begins meanwhile.
    settings.values |= values
    if listener is None or not connections_of(session.sync_session):
        return
    try:
        await greenlet_spawn(listener.apply_now, session.sync_session)
    except BaseException:
        for name, value in former.items():
            if value is None:
                settings.values.pop(name, None)
            else:
                settings.values[name] = value
        raise


def inherit(outer: object, store: object) -> None:
    """Give a nested context a copy of the settings of the outer one."""
    if outer is not None and (databases := contexts.of(outer)):
        copies = {key: Settings(each.database, each.required, dict(each.values)) for key, each in databases.items()}
        contexts.set(store, copies)


def _settings_of(store: object, database: object, required: tuple[str, ...]) -> Settings:
    databases = contexts.of(store)
    if databases is None:
        databases = contexts.set(store, {})
    settings = databases.get(id(database))
    if settings is None:
        settings = databases[id(database)] = Settings(database, required, {})
    return settings


def _listener(session: AsyncSession, settings: Settings) -> SettingsListener | None:
    if not is_async_session(session):
        return None
    info = session.sync_session.info
    listener: SettingsListener | None = info.get(_KEY)
    if listener is None:
        listener = info[_KEY] = SettingsListener(session.sync_session, settings)
    listener.settings = settings
    return listener


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of settings in lower case, because PostgreSQL does not distinguish the case."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"expected the names of settings, got {type(names).__name__}")
    names = tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a setting must be a str, got {type(name).__name__}")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not the name of a setting: expected letters, digits and underscores, with a dot between "
                "the parts, such as 'app.tenant_id'"
            )
    return tuple(name.lower() for name in names)


def check_values(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings with their names in lower case."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"expected a mapping of names to values, got {type(settings).__name__}")
    if not settings:
        raise ValueError("set_local() needs at least one setting")
    checked = dict(zip(check_names(settings), settings.values(), strict=True))
    for name, value in checked.items():
        if not isinstance(value, str):
            raise TypeError(f"the value of {name!r} must be a str, got {type(value).__name__}")
        if "\0" in value:
            raise ValueError(f"the value of {name!r} contains a NUL character, which PostgreSQL cannot store")
    return checked
