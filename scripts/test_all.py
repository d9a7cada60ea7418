"""Run the tests with each interpreter of this machine, on SQLAlchemy 2.0 and 2.1, and print a table.

    python scripts/test_all.py [ARGUMENT OF PYTEST]...

Each combination has its own environment, into which the package is installed from a wheel, as users install it: the
native wheel, or the pure wheel if the interpreter has no native module. Tests that cannot run with an interpreter are
skipped. The reasons are printed below the table.

A free-threaded interpreter runs all tests with the GIL, because a release of greenlet that does not support free
threading enables the GIL. The tests that need no database run once more without the GIL.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from interpreters import Interpreter, interpreters

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "test-all"
SQLALCHEMY = {"2.0": "sqlalchemy[asyncio]>=2.0.40,<2.1", "2.1": "sqlalchemy[asyncio]>=2.1,<2.2"}
# The tests of the native module with threads. They need no database.
WITHOUT_GIL = [f"tests/test_{name}.py" for name in ("threads", "native_awaitable", "isolated", "parity_of_objects")]
COUNTS = re.compile(r"^(native|python|neither) +(\d+) passed, (\d+) failed, (\d+) skipped$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    interpreter: str
    sqlalchemy: str
    driver: str
    backend: str
    passed: str = ""
    failed: str = ""
    skipped: str = ""
    seconds: str = ""

    def __str__(self) -> str:
        return (
            f"{self.interpreter:<24}{self.sqlalchemy:<12}{self.driver:<10}{self.backend:<9}"
            f"{self.passed:>7}{self.failed:>8}{self.skipped:>9}{self.seconds:>9}"
        )


def main() -> None:
    print(f"-- The output of each run and the environments are in {FOLDER.relative_to(ROOT)}")
    all_passed = True
    rows = [Row("Interpreter", "SQLAlchemy", "driver", "backend", "passed", "failed", "skipped", "seconds")]
    notes: list[str] = []
    for interpreter in interpreters():
        reasons = filter(None, [interpreter.without_native, interpreter.without_asyncpg, interpreter.without_greenlet])
        notes += [f"{interpreter.name}: {reason}" for reason in reasons]
        folder = FOLDER / interpreter.kind
        wheel = build(interpreter, folder)
        for series, requirement in SQLALCHEMY.items():
            say(f"{interpreter.name}, SQLAlchemy {series}")
            python = environment(interpreter, folder / series, wheel, requirement)
            runs = {"": ["-Xgil=1"], ", no GIL": ["-Xgil=0"]} if interpreter.free_threaded else {"": list[str]()}
            if interpreter.without_greenlet is not None:
                del runs[""]
            for name, options in runs.items():
                log = folder / f"{series}{name}.log"
                found, passed = run_tests(python, options, WITHOUT_GIL if name else [], log, interpreter, name)
                rows += found
                all_passed = all_passed and passed
                print(rows[0], *found, sep="\n", flush=True)
    print("\nAll runs:", *rows, *notes, sep="\n")
    sys.exit(not all_passed)


def build(interpreter: Interpreter, folder: Path) -> Path:
    say(f"{interpreter.name}: building")
    # Remove the wheels of earlier runs. They may have been built from other sources.
    for old in folder.glob("*.whl"):
        old.unlink()
    pure = "false" if interpreter.without_native is None else "true"
    pip(interpreter.path, "wheel", "--no-deps", f"--config-settings=pure={pure}", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


def environment(interpreter: Interpreter, folder: Path, wheel: Path, sqlalchemy: str) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        run(interpreter.path, "-m", "venv", "--without-pip", folder)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    needs = [each for each in (*groups["demo"], *groups["test"]) if isinstance(each, str)]
    if interpreter.without_asyncpg is not None:
        needs = [each for each in needs if not each.startswith("asyncpg")]
    if interpreter.free_threaded:
        # psycopg-binary has no wheel for a free-threaded Python. psycopg uses the libpq of the system.
        needs = [each.replace("psycopg[binary]", "psycopg") for each in needs]
    # Install the newest release with a wheel. A newer release without one might not compile with this interpreter.
    wheels = ("--prefer-binary", "--only-binary=pydantic-core")
    pip(python, "install", *wheels, *needs, sqlalchemy)
    pip(python, "install", "--no-deps", "--force-reinstall", wheel)
    return python


def run_tests(
    python: Path, python_options: list[str], tests: list[str], log: Path, interpreter: Interpreter, name: str
) -> tuple[list[Row], bool]:
    # Test the installed package: neither PYTHONPATH nor CTXALCHEMY_BACKEND may change what the tests import.
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CTXALCHEMY_BACKEND")}
    url, driver, options = variables["TEST_DATABASE_URL"], "asyncpg", list[str]()
    if interpreter.without_native is not None:
        options.append(f"--without-native={interpreter.without_native}")
    if interpreter.without_asyncpg is not None:
        driver = "psycopg"
        variables["TEST_DATABASE_URL"] = url.replace("+asyncpg", "+psycopg")
    plugins = ["-p", "tests.support.both_backends", "-p", "no:cacheprovider"]
    command: list[str | Path] = [
        python,
        *python_options,
        "-m",
        "pytest",
        "-q",
        *plugins,
        *options,
        *tests,
        *sys.argv[1:],
    ]
    start = time.monotonic()
    result = subprocess.run(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = f"{time.monotonic() - start:.0f}"
    log.write_text(result.stdout, encoding="utf-8")
    version = output(python, "-c", "import sqlalchemy; print(sqlalchemy.__version__)")
    rows = [
        Row(interpreter.name + name, version, driver, backend, passed, failed, skipped, seconds)
        for backend, passed, failed, skipped in COUNTS.findall(result.stdout)
    ]
    if result.returncode or not rows:
        print(result.stdout[-4000:])
        failure = f"pytest failed with exit status {result.returncode}: see {log.relative_to(ROOT)}"
        rows.append(Row(interpreter.name + name, version, driver, failure))
    return rows, result.returncode == 0


def pip(python: str | Path, *arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python, *arguments)


def run(*command: str | Path) -> None:
    target = {"CARGO_TARGET_DIR": str(ROOT / "target" / "wheels")}
    if subprocess.run(command, env={**os.environ, **target}).returncode:
        sys.exit(f"This command failed: {' '.join(map(str, command))}")


def output(*command: str | Path) -> str:
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()


def say(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    main()
