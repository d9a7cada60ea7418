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
    """A gate in front of the statements of other tasks on one session.  It is open at first.

    Args:
        session: the session.
    """

    __slots__ = ("_session", "opened", "task")

    def __init__(self, session: Session) -> None:
        self._session = session
        self.opened: asyncio.Event | None = None
        self.task: asyncio.Task[object] | None = None

    def close(self) -> None:
        """Let the statements of other tasks wait from now on."""
        if self.opened is None:
            self.opened = asyncio.Event()
            self.task = asyncio.current_task()
            self._session.info[_KEY] = self
            # The listener stays: a task that waits in it is iterating over the listeners.
            if not event.contains(self._session, "do_orm_execute", _wait_for_commit):
                event.listen(self._session, "do_orm_execute", _wait_for_commit)

    def open(self) -> None:
        """Let the statements of other tasks go on."""
        if self.opened is not None:
            self._session.info.pop(_KEY, None)
            self.opened.set()


def _wait_for_commit(state: ORMExecuteState) -> None:
    gate: Gate | None = state.session.info.get(_KEY)
    # A listener of the application may execute a statement during the commit itself.
    if gate is not None and gate.opened is not None and asyncio.current_task() is not gate.task and in_greenlet():
        await_only(gate.opened.wait())
