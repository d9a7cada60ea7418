"""Run a command with a temporary PgBouncer in transaction mode, in front of the server of TEST_DATABASE_URL.

    python scripts/postgres.py -- python scripts/pgbouncer.py -- COMMAND...

The environment variable TEST_PGBOUNCER_URL passes the URL of PgBouncer to the command. The exit status of this script
is the exit status of the command. If TEST_PGBOUNCER_URL is already set, no PgBouncer is started.

The script uses the PgBouncer program of this machine. If there is none, the command runs without TEST_PGBOUNCER_URL.
PgBouncer listens on 127.0.0.1, and its files are in a temporary directory. However the command ends, the script then
stops PgBouncer and removes the directory.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import temporary_server
from temporary_server import PATH, connect_to, environment, free_port, process_options, running, say

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER_URL_VARIABLE = "TEST_DATABASE_URL"
URL_VARIABLE = "TEST_PGBOUNCER_URL"
SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "pool_mode": "transaction",
    # Each transaction of a client runs on another server connection than the one before it, if several are idle.
    "server_round_robin": "1",
    "default_pool_size": "60",
    "max_client_conn": "500",
    # Clients may connect as any user: PgBouncer logs in with the user of TEST_DATABASE_URL.
    "auth_type": "any",
    "admin_users": "postgres",
    # The settings of the read-only engine of ctxalchemy: see the database READERS below.
    "ignore_startup_parameters": "default_transaction_read_only, options",
    # The server reports these errors to clients at once. By default, PgBouncer retries for 15 seconds.
    "server_login_retry": "1",
}
READERS = "readers"
"""The name of a database whose server connections refuse writes. On the server, it is the one of TEST_DATABASE_URL."""


def main() -> int:
    return temporary_server.main("PgBouncer", URL_VARIABLE, server)


@contextmanager
def server() -> Iterator[str | None]:
    """Start PgBouncer. Stop it and remove its files at the end."""
    program = shutil.which("pgbouncer", path=PATH)
    if program is None:
        say("PgBouncer: not found on this machine, its tests are skipped (to run them: apt-get install pgbouncer)")
        yield None
        return
    server_url = os.environ.get(SERVER_URL_VARIABLE)
    if not server_url:
        sys.exit(
            f"{SERVER_URL_VARIABLE} is not set. Run this script with scripts/postgres.py, which sets the variable."
        )
    with tempfile.TemporaryDirectory(prefix="pgbouncer-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        port = free_port()
        options = process_options(directory, environment("PG"), user="postgres")
        configuration = directory / "pgbouncer.ini"
        configuration.touch(mode=0o600)
        configuration.write_text(configuration_for(server_url, port))
        if "user" in options:
            os.chown(configuration, options["user"], options["group"])
        immediate = signal.SIGTERM
        with running("PgBouncer", [program, configuration], connect_to(port), options, immediate):
            say(f"PgBouncer: a temporary PgBouncer in transaction mode on port {port}, with the program {program}")
            yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"


def configuration_for(server_url: str, port: int) -> str:
    """Return a configuration that passes each other database on to the database of the same name on the server."""
    url = urlsplit(server_url)
    server = {"host": url.hostname, "port": url.port, "user": url.username, "password": url.password}
    target = " ".join(f"{name}={quoted(unquote(str(value)))}" for name, value in server.items() if value is not None)
    settings = "\n".join(f"{name} = {value}" for name, value in {**SETTINGS, "listen_port": port}.items())
    readers = f"dbname={quoted(url.path[1:])} connect_query='SET default_transaction_read_only = on'"
    return f"[databases]\n{READERS} = {target} {readers}\n* = {target}\n\n[pgbouncer]\n{settings}\n"


def quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


if __name__ == "__main__":
    sys.exit(main())
