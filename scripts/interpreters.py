"""Find the Python interpreters on this machine: those of pyenv and those on PATH; the newest of each kind.

If the environment variable PYTHONS is set, only the commands that it lists are used. Set it for an interpreter in any
other folder. ``:`` separates the commands: ``PYTHONS=python3.13:/opt/free-threaded/bin/python3.14t``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST = (3, 11)
NEWEST = (3, 15)
# With this variable, PyO3 builds for an interpreter that it does not support.
SKIP_PYO3_CHECK = "UNSAFE_PYO3_SKIP_VERSION_CHECK"
ASK = """
import json, platform, sys, sysconfig
threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(json.dumps([sys.executable, platform.python_implementation(), list(sys.version_info[:3]), threaded]))
"""


@dataclass(frozen=True)
class Interpreter:
    path: str
    implementation: str
    version: tuple[int, ...]
    free_threaded: bool

    @property
    def name(self) -> str:
        """The name in tables, for example ``CPython 3.13.0t``."""
        return f"{self.implementation} {'.'.join(map(str, self.version))}{'t' if self.free_threaded else ''}"

    @property
    def kind(self) -> str:
        """The kind, for example ``cpython3.13t``. Of each kind, the newest interpreter is used."""
        minor = ".".join(map(str, self.version[:2]))
        return f"{self.implementation.lower()}{minor}{'t' if self.free_threaded else ''}"

    @property
    def without_native(self) -> str | None:
        """The reason why this interpreter has no native module. ``None`` if it has one."""
        if self.implementation != "CPython":
            return "the native module supports CPython only"
        if self.free_threaded and self.version < (3, 14) and os.environ.get(SKIP_PYO3_CHECK) != "1":
            return f"PyO3 supports free threading from Python 3.14 on; set {SKIP_PYO3_CHECK}=1 to build it on 3.13"
        return None

    @property
    def without_asyncpg(self) -> str | None:
        """The reason why asyncpg cannot be installed. ``None`` if it can."""
        return None if self.implementation == "CPython" else "asyncpg supports CPython only"

    @property
    def without_greenlet(self) -> str | None:
        """The reason why SQLAlchemy's asyncio extension cannot be used. ``None`` if it can."""
        if self.free_threaded and self.version < (3, 14):
            return "greenlet 3.2.2, the last release with a wheel, crashes, and newer ones do not build: no database"
        return None


def interpreters() -> list[Interpreter]:
    newest: dict[str, Interpreter] = {}
    for command in _commands():
        found = _ask(command)
        if found is not None and found.version >= OLDEST:
            best = newest.setdefault(found.kind, found)
            newest[found.kind] = max(best, found, key=lambda each: each.version)
    return sorted(newest.values(), key=lambda each: (each.implementation, each.version[:2], each.free_threaded))


def _commands() -> Iterator[str]:
    if listed := os.environ.get("PYTHONS"):
        yield from filter(None, listed.split(os.pathsep))
        return
    yield sys.executable
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
        yield from map(str, sorted(Path(root, "versions").glob("*/bin/python3")))
    minors = range(OLDEST[1], NEWEST[1] + 1)
    names = ["python3", *(f"python3.{minor}{kind}" for minor in minors for kind in ("", "t")), "pypy3"]
    yield from filter(None, map(shutil.which, names))


def _ask(command: str) -> Interpreter | None:
    """Run the command and return what it is. ``None`` if it does not run, like a shim of pyenv with no version."""
    try:
        result = subprocess.run([command, "-c", ASK], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        if os.environ.get("PYTHONS"):
            sys.exit(f"PYTHONS lists {command}, but this command does not run")
        return None
    path, implementation, version, free_threaded = json.loads(result.stdout)
    return Interpreter(path, implementation, tuple(version), free_threaded)


if __name__ == "__main__":
    for each in interpreters():
        print(f"{each.name:<20}{each.without_native or 'native'}")
