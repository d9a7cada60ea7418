"""Run a command with a temporary Redis server.

    python scripts/redis_server.py -- COMMAND...

The environment variable TEST_REDIS_URL passes the URL of the server to the command. The exit status of this script is
the exit status of the command. If TEST_REDIS_URL is already set, no server is started.

The script uses the Redis program of this machine. If there is none, the command runs without TEST_REDIS_URL. The server
listens on 127.0.0.1, and writes no data to the disk. However the command ends, the script then stops the server.
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
from temporary_server import PATH, connect_to, environment, free_port, process_options, running, say

if TYPE_CHECKING:
    from collections.abc import Iterator

URL_VARIABLE = "TEST_REDIS_URL"


def main() -> int:
    return temporary_server.main("Redis", URL_VARIABLE, server)


@contextmanager
def server() -> Iterator[str | None]:
    """Start a server. Stop it and remove its files at the end."""
    program = shutil.which("redis-server", path=PATH)
    if program is None:
        say("Redis: not found on this machine, its tests are skipped (to run them: apt-get install redis-server)")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="redis-", ignore_cleanup_errors=True) as name:
        port = free_port()
        options = process_options(Path(name), environment(), user="redis")
        command: list[str | Path] = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
        with running("Redis", command, connect_to(port), options, signal.SIGTERM):
            say(f"Redis: a temporary server on port {port}, with the program {program}")
            yield f"redis://127.0.0.1:{port}"


if __name__ == "__main__":
    sys.exit(main())
