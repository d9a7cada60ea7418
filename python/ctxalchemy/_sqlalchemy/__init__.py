"""One session and the connections below it: everything that depends on how SQLAlchemy and the drivers work inside.

``session`` commits, rolls back and closes one session.  ``in_use`` finds the tasks that are using the session, and
``gate`` lets the statements of other tasks wait for a commit.  ``guard`` tracks the state of each connection.
``cursors`` keeps streamed results away from connections that were checked in.  ``drivers`` contains what differs
between drivers, and ``internals`` contains every name that SQLAlchemy does not promise to keep.
"""

from typing import TypeGuard

from sqlalchemy.ext.asyncio import AsyncSession


def is_async_session(session: object) -> TypeGuard[AsyncSession]:
    """Return whether this is an ``AsyncSession``.  The ``__class__`` of a mock does not count."""
    return issubclass(type(session), AsyncSession)
