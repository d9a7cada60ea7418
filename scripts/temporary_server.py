"""Run a command with a temporary server: what the scripts of all servers have in common."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import FrameType

START_TIMEOUT = 60.0
CONNECT = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)"
# Debian installs mariadbd and pgbouncer into a directory that is on the PATH of root only.
PATH = os.pathsep.join([*os.get_exec_path(), "/usr/local/sbin", "/usr/sbin"])
STOP_SIGNALS = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
]


def main(product: str, url_variable: str, server: Callable[[], AbstractContextManager[str | None]]) -> int:
    """Run the command of ``sys.argv``, and return its exit status.

    Args:
        product: the name of the server's product, for messages.
        url_variable: the environment variable that passes the URL of the server to the command.
        server: starts the server, and stops it at the end. Its value is the URL of the server, or ``None`` if the
            command has to run without a server.
    """
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        sys.exit(f"Usage: python {sys.argv[0]} -- COMMAND...")
    command = sys.argv[2:]
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    if os.environ.get(url_variable):
        say(f"{product}: the server of {url_variable}")
        return run(command, {})
    with server() as url:
        return run(command, {} if url is None else {url_variable: url})


def stop(number: int, _frame: FrameType | None) -> NoReturn:
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """Ignore the stop signals, so that the clean-up runs to its end: ``make``, for example, sends SIGTERM twice."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run(command: list[str], variables: dict[str, str]) -> int:
    if signal.SIGINT in STOP_SIGNALS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # Ctrl-C. The command receives it too, and may print where it was interrupted.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        status = -signal.SIGINT
    finally:
        end(process, signal.SIGTERM)
    return status if status >= 0 else 128 - status


def process_options(directory: Path, variables: dict[str, str], user: str) -> dict[str, Any]:
    """Return the options of ``Popen`` for the processes of a server, which do not run as root.

    Args:
        directory: the temporary directory of the server. The user of the server becomes its owner.
        variables: the environment variables of the processes.
        user: the name of the user that runs the server if this script runs as root.
    """
    options: dict[str, Any] = {"cwd": directory, "env": variables, "start_new_session": True}
    if os.geteuid() == 0:
        account = unprivileged_user(user)
        options |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        os.chown(directory, account.pw_uid, account.pw_gid)
    return options


def unprivileged_user(preferred: str) -> pwd.struct_passwd:
    for name in (preferred, "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    sys.exit(f"The server does not run as root, and this machine has neither a user {preferred!r} nor a user 'nobody'.")


def run_to_its_end(what: str, command: list[str | Path], options: dict[str, Any]) -> None:
    """Run a command that prepares the server, and wait for its end, even after a signal."""
    with (options["cwd"] / "log").open("w+") as log:
        with subprocess.Popen(command, **options, stdout=log, stderr=log) as process:
            process.wait()
        if process.returncode:
            fail(f"{what} failed", log)


@contextmanager
def running(
    product: str, command: list[str | Path], check: list[str | Path], options: dict[str, Any], stop_signal: int
) -> Iterator[None]:
    """Start a server, and stop it at the end. The block runs when the command ``check`` succeeds."""
    with (options["cwd"] / "log").open("w+") as log:
        process = subprocess.Popen(command, **options, stdout=log, stderr=log)
        try:
            if not is_ready(process, check, options["env"]):
                fail(f"{product} did not start", log)
            yield
        finally:
            ignore_signals()
            end(process, stop_signal)


def connect_to(port: int) -> list[str | Path]:
    """Return a command that succeeds if a server listens on the port."""
    return [sys.executable, "-c", CONNECT, str(port)]


def is_ready(process: subprocess.Popen[Any], check: list[str | Path], variables: dict[str, str]) -> bool:
    """Wait until the server accepts connections. Return ``False`` if it exits or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        answer = subprocess.run(check, env=variables, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if answer.returncode == 0:
            return True
        time.sleep(0.05)
    return False


def end(process: subprocess.Popen[Any], number: int) -> None:
    process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
    process.wait()


def fail(what: str, log: TextIO) -> NoReturn:
    log.seek(0)
    sys.exit(f"{what}:\n{log.read()}")


def environment(*prefixes: str) -> dict[str, str]:
    """Return this environment without the variables that change how the server behaves."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | {"LC_ALL": "C"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def say(message: str) -> None:
    print(f"-- {message}", flush=True)
