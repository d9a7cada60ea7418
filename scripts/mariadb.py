"""Run a command with a temporary MariaDB server.

    python scripts/mariadb.py -- COMMAND...

The environment variable TEST_MARIADB_URL passes the URL of the server to the command. The exit status of this script
is the exit status of the command. If TEST_MARIADB_URL is already set, no server is started.

The server uses the MariaDB programs of this machine. If there are none, the command runs without TEST_MARIADB_URL. The
server listens on 127.0.0.1, and its files are in a temporary directory. However the command ends, the script then stops
the server and removes the directory.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import temporary_server
from temporary_server import PATH, environment, free_port, process_options, run_to_its_end, running, say

if TYPE_CHECKING:
    from collections.abc import Iterator

URL_VARIABLE = "TEST_MARIADB_URL"
PROGRAMS = ("mariadb-install-db", "mariadbd", "mariadb-admin")
INSTALL_OPTIONS = ("--auth-root-authentication-method=normal", "--skip-name-resolve", "--skip-test-db")
SETTINGS = {
    "bind-address": "127.0.0.1",
    "character-set-server": "utf8mb4",
    "innodb-buffer-pool-size": "32M",
    "innodb-flush-log-at-trx-commit": "0",
    "innodb-flush-method": "nosync",
    "innodb-log-file-size": "8M",
    "innodb-lock-wait-timeout": "10",
    "max-connections": "200",
    "performance-schema": "off",
    "skip-name-resolve": "on",
}


def main() -> int:
    return temporary_server.main("MariaDB", URL_VARIABLE, server)


@contextmanager
def server() -> Iterator[str | None]:
    """Create and start a server. Stop it and remove its files at the end."""
    programs = [shutil.which(program, path=PATH) for program in PROGRAMS]
    if None in programs:
        say("MariaDB: not found on this machine, its tests are skipped (to run them: apt-get install mariadb-server)")
        yield None
        return
    install_db, mariadbd, admin = map(str, programs)
    with tempfile.TemporaryDirectory(prefix="mariadb-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        data, port = directory / "data", free_port()
        options = process_options(directory, environment("MARIADB", "MYSQL"), user="mysql")
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        files = [f"--datadir={data}", f"--socket={directory / 'socket'}", f"--pid-file={directory / 'pid'}"]
        install: list[str | Path] = [install_db, "--no-defaults", f"--datadir={data}", *INSTALL_OPTIONS]
        command: list[str | Path] = [mariadbd, "--no-defaults", *files, f"--port={port}", *settings]
        check: list[str | Path] = [admin, "--no-defaults", "--host=127.0.0.1", f"--port={port}", "--user=root", "ping"]
        run_to_its_end("MariaDB's mariadb-install-db", install, options)
        immediate = signal.SIGKILL  # Nothing has to be written to the disk any more.
        with running("MariaDB", command, check, options, immediate):
            say(f"MariaDB: a temporary server on port {port}, with the program {mariadbd}")
            yield f"mysql+aiomysql://root@127.0.0.1:{port}/?charset=utf8mb4"


if __name__ == "__main__":
    sys.exit(main())
