"""A PostgreSQL server and a streaming standby of it, which a test may kill, silence and promote.

The servers listen on two addresses of this machine, 127.0.0.1 and 127.0.0.2, with the same port: like two machines,
they differ only in the host.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import postgres
import pytest
from temporary_server import environment, is_ready, process_options, run_to_its_end

from .schema import connect
from .waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .schema import Observer

PRIMARY, STANDBY = "127.0.0.1", "127.0.0.2"
STANDBY_NAME = "standby"
SETTINGS = postgres.SETTINGS | {
    # A COMMIT is answered when the standby has written it too.
    "synchronous_commit": "on",
    "wal_level": "replica",
}


class Server:
    """A server process with its children.

    Args:
        host: the address on which it listens.
        port: the port.
        data: the directory of its files.
        binaries: the directory of the programs.
        options: the options of ``Popen``.
    """

    def __init__(self, host: str, port: int, data: Path, binaries: Path, options: dict[str, Any]) -> None:
        self.host = host
        self.port = port
        self.data = data
        self._binaries = binaries
        self._options = options
        self._process: subprocess.Popen[Any] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@{self.host}:{self.port}/postgres"

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run a program of PostgreSQL that prepares the server."""
        run_to_its_end(program, [self._binaries / program, *arguments], self._options)

    def start(self, **settings: str) -> None:
        """Start the server, and wait until it accepts connections."""
        settings = {**SETTINGS, "listen_addresses": self.host, **settings}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        command: list[str | Path] = [self._binaries / "postgres", "-D", self.data, "-p", str(self.port), *arguments]
        with (self.data.parent / f"{self.data.name}.log").open("w") as log:
            self._process = subprocess.Popen(command, **self._options, stdout=log, stderr=log)
        check: list[str | Path] = [self._binaries / "pg_isready", "-h", self.host, "-p", str(self.port)]
        if not is_ready(self._process, check, self._options["env"]):
            raise RuntimeError(f"PostgreSQL did not start on {self.host}: {Path(log.name).read_text()}")

    def crash(self) -> None:
        """Kill all processes at once: clients see that their connections are closed, and new ones are refused."""
        # A stopped process starts no other process that would escape.
        self._signal_all(signal.SIGSTOP)
        self._signal_all(signal.SIGKILL)

    def fall_silent(self) -> None:
        """Stop all processes: connections stay open, new ones are accepted by the kernel, and nothing is answered."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let all processes of a server that has fallen silent go on, as if nothing had happened."""
        self._signal_all(signal.SIGCONT)

    def end(self) -> None:
        """Kill the server, if it was started."""
        if self._process is not None:
            if self._process.poll() is None:
                self.crash()
            self._process.wait()

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._process is not None
        parent = self._process.pid
        children = _children(parent) if number is signal.SIGKILL else []
        os.kill(parent, number)
        for pid in children or _children(parent):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def connect(self) -> Observer:
        return await connect(self.url)

    async def stop_receiving(self) -> None:
        """Let the standby receive nothing more from its primary."""
        observer = await self.connect()
        await observer.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await observer.execute("SELECT pg_reload_conf()")
        assert await eventually(lambda: _is_empty(observer, "SELECT 1 FROM pg_stat_wal_receiver"))
        await observer.close()

    async def promote(self) -> None:
        """Let the standby accept writes, and wait until it does."""
        observer = await self.connect()
        assert await observer.fetchval("SELECT pg_promote()")
        await observer.close()


class Pair:
    """A primary, and a standby that follows the primary."""

    def __init__(self, directory: Path, primary: Server, standby: Server) -> None:
        self.directory = directory
        self.primary = primary
        self.standby = standby

    @classmethod
    @asynccontextmanager
    async def start(cls, *, synchronous: bool = True) -> AsyncIterator[Pair]:
        """Start both servers.

        Args:
            synchronous: whether the primary answers a COMMIT only when the standby has it.
        """
        binaries = binaries_with_base_backup()
        with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
            directory = Path(name)
            options = process_options(directory, environment("PG"), user="postgres")
            port = _port_that_is_free_on(PRIMARY, STANDBY)
            primary = Server(PRIMARY, port, directory / "primary", binaries, options)
            standby = Server(STANDBY, port, directory / "standby", binaries, options)
            try:
                options_of_initdb = [
                    "--username=postgres",
                    "--auth=trust",
                    "--encoding=UTF8",
                    "--locale=C",
                    "--no-sync",
                ]
                await asyncio.to_thread(primary.run, "initdb", "--pgdata", primary.data, *options_of_initdb)
                names = {"synchronous_standby_names": STANDBY_NAME} if synchronous else {}
                await asyncio.to_thread(primary.start, **names)
                source = ["-h", PRIMARY, "-p", str(port), "-U", "postgres"]
                copy = ["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"]
                await asyncio.to_thread(standby.run, "pg_basebackup", "-D", standby.data, *source, *copy)
                await asyncio.to_thread(standby.start, cluster_name=STANDBY_NAME)
                pair = cls(directory, primary, standby)
                await pair._wait_for_replication("sync" if synchronous else "async")
                yield pair
            finally:
                primary.end()
                standby.end()

    async def _wait_for_replication(self, state: str) -> None:
        observer = await self.primary.connect()
        statement = f"SELECT 1 FROM pg_stat_replication WHERE sync_state = '{state}'"
        assert await eventually(lambda: observer.fetch(statement), 20)
        await observer.close()


def binaries_with_base_backup() -> Path:
    """Return the directory of the programs, or skip the test."""
    binaries = postgres.installed_binaries()
    if binaries is None or not os.access(binaries / "pg_basebackup", os.X_OK):
        pytest.skip("without a standby: the programs of PostgreSQL, with pg_basebackup, are not installed")
    if not Path("/proc/self/task").exists():
        pytest.skip("without a standby: the processes of a server are found in /proc")
    return binaries


async def _is_empty(observer: Observer, query: str) -> bool:
    return not await observer.fetch(query)


def _children(pid: int) -> list[int]:
    """Return the processes that this process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name of the program, in parentheses, may contain spaces.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _port_that_is_free_on(*hosts: str) -> int:
    with socket.socket() as first:
        first.bind((hosts[0], 0))
        port = int(first.getsockname()[1])
        for host in hosts[1:]:
            with socket.socket() as other:
                other.bind((host, port))
    return port


def connections_to(host: str, port: int) -> int:
    """Return the number of TCP connections from this machine to this address."""
    address = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    established = "01"
    return sum(remote == address and state == established for _, _, remote, state, *_ in map(str.split, lines))
