"""In a forked child process: use no context, no session and no connection of the parent.

A child shares the sockets of its parent.  A statement that the child sends on such a socket runs in the transaction of
the parent, or breaks its connection.
"""

from __future__ import annotations

import os

from ._host_engines import all_host_engines
from ._loan import lineage

_inherited: list[object] = []
"""Sessions and engines of the parent.  If they were freed, their drivers would close connections, and an event loop
that shares its epoll instance with the parent would stop watching the sockets of the parent."""


def _leave_to_parent() -> None:
    _inherited.extend(store.close() for context in lineage() if (store := context()) is not None)
    for engines in list(all_host_engines):
        _inherited.extend(engines.leave_to_parent())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
