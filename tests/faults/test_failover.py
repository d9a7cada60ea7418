"""The primary fails under load, its standby is promoted, and the service finds the standby.

``make failover`` runs the same for longer, and prints figures.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url, text
from support.failover import Fault, Way, fail_over
from support.schema import needs_asyncpg
from support.standby import Pair

if TYPE_CHECKING:
    from types import ModuleType

    from support.schema import Schema


@needs_asyncpg
@pytest.mark.parametrize(("fault", "way"), [("crash", "handler"), ("silence", "monitor")])
async def test_no_success_is_lost_and_the_service_recovers(ctxalchemy: ModuleType, fault: Fault, way: Way) -> None:
    async with Pair.start() as pair:
        outcome = await fail_over(ctxalchemy, pair, fault, way, before=0.3, detection=0.5)
    assert outcome.failures() == []


@needs_asyncpg
async def test_asynchronous_standby_that_is_behind_loses_successes(ctxalchemy: ModuleType) -> None:
    """Otherwise the test above could not fail."""
    async with Pair.start(synchronous=False) as pair:
        outcome = await fail_over(ctxalchemy, pair, "crash", "handler", before=0.3, lag=0.5, detection=0.5)
    assert outcome.lost
    assert outcome.failures() == [f"{len(outcome.lost)} writes that were answered as a success are lost"]


@needs_asyncpg
async def test_asyncpg_spends_its_timeout_on_the_first_of_several_hosts(ctxalchemy: ModuleType, schema: Schema) -> None:
    """Therefore the guide does not recommend several hosts in the URL.  If this fails, change the guide."""
    url = make_url(schema.url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = [f"127.0.0.1:{silent.getsockname()[1]}", f"{url.host}:{url.port or 5432}"]
        db = ctxalchemy.DBConnect.from_url(
            url.set(host=None, port=None, query={"host": hosts}),
            connect_args={"timeout": 0.5, "target_session_attrs": "primary"},
        )
        began = time.monotonic()
        async with db, ctxalchemy.new_non_ctx_session(db) as session:
            with pytest.raises(TimeoutError):
                await session.execute(text("SELECT 1"))
    assert time.monotonic() - began < 5
