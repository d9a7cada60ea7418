"""While a session is being committed, a statement of another task waits for the commit.

SQLAlchemy raises an error for such a statement.  A response body may read the database while the middleware commits,
for example the generator of server-sent events.  A listener on each session would slow down every statement, so the
gate is closed only if another task is using the session, or if the response is a stream.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqlalchemy import event

from .internals import await_only, in_greenlet

if TYPE_CHECKING:
    from sqlalchemy.orm import ORMExecuteState, Session

_KEY = "ctxalchemy: closed gate"


class Gate:
    """A closed gate in front of the statements of other tasks on one session.

    Args:
        session: the session.
    """

    __slots__ = ("_session", "opened", "task")

    def __init__(self, session: Session) -> None:
        self._session = session
        self.opened = asyncio.Event()
        self.task = asyncio.current_task()
        session.info[_KEY] = self
        # The listener stays: a task that waits in it is iterating over the listeners.
        if not event.contains(session, "do_orm_execute", _wait_for_commit):
            event.listen(session, "do_orm_execute", _wait_for_commit)

    def open(self) -> None:
        """Let the statements of other tasks go on."""
        self._session.info.pop(_KEY, None)
        self.opened.set()


def _wait_for_commit(state: ORMExecuteState) -> None:
    gate: Gate | None = state.session.info.get(_KEY)
    # A listener of the application may execute a statement during the commit itself.
    if gate is not None and asyncio.current_task() is not gate.task and in_greenlet():
        await_only(gate.opened.wait())
