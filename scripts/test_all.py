"""Run the tests with each interpreter of this machine, on SQLAlchemy 2.0 and 2.1, and print a table.

    python scripts/test_all.py [--only {2.0,2.1,lowest}] [ARGUMENT OF PYTEST]...

The newest releases of all dependencies are installed. One more run, ``lowest``, installs the lowest versions that
pyproject.toml allows. Its interpreter is the oldest CPython that the package supports, because newer interpreters need
newer releases. With ``--only``, the other runs are left out.

Each combination has its own environment, into which the package is installed from a wheel, as users install it: the
native wheel, or the pure wheel if the interpreter has no native module. Tests that cannot run with an interpreter are
skipped. The reasons are printed below the table.

A free-threaded interpreter runs without the GIL, even if a module asks for the GIL. On free-threaded 3.13, only the
tests that need no database run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from interpreters import OLDEST, Interpreter, interpreters

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "test-all"
SQLALCHEMY = {"2.0": "sqlalchemy<2.1", "2.1": "sqlalchemy>=2.1"}
LOWEST = "lowest"
# The tests that run where greenlet crashes. They need no database.
WITHOUT_GREENLET = [
    f"tests/test_{name}.py" for name in ("threads", "native_awaitable", "isolated", "parity_of_objects")
]
OLDEST_CPYTHON = f"cpython{'.'.join(map(str, OLDEST))}"
# The lower bound of a requirement and the other bounds. A marker after ";" is not matched.
FLOOR = re.compile(r">=([^,;\s]+)[^;]*")
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
    parser = argparse.ArgumentParser(description="Run the tests with each interpreter. Other arguments go to pytest.")
    parser.add_argument("--only", choices=[*SQLALCHEMY, LOWEST], help="run only with these versions")
    options, for_pytest = parser.parse_known_args()
    print(f"-- The output of each run and the environments are in {FOLDER.relative_to(ROOT)}")
    all_passed = True
    rows = [Row("Interpreter", "SQLAlchemy", "driver", "backend", "passed", "failed", "skipped", "seconds")]
    notes: list[str] = []
    for interpreter in interpreters():
        reasons = filter(None, [interpreter.without_native, interpreter.without_asyncpg, interpreter.without_greenlet])
        notes += [f"{interpreter.name}: {reason}" for reason in reasons]
        folder = FOLDER / interpreter.kind
        is_oldest = interpreter.kind == OLDEST_CPYTHON
        versions = [each for each in (*SQLALCHEMY, *([LOWEST] if is_oldest else [])) if options.only in (None, each)]
        if not versions:
            continue
        wheel = build(interpreter, folder)
        for version in versions:
            say(f"{interpreter.name}, {'the lowest versions' if version == LOWEST else f'SQLAlchemy {version}'}")
            python = environment(interpreter, folder / version, wheel, requirements(interpreter, version))
            name = f"{interpreter.name}{f', {LOWEST}' if version == LOWEST else ''}"
            tests = [*(WITHOUT_GREENLET if interpreter.without_greenlet is not None else []), *for_pytest]
            found, passed = run_tests(python, tests, folder / f"{version}.log", interpreter, name)
            rows += found
            all_passed = all_passed and passed
            print(rows[0], *found, sep="\n", flush=True)
    if len(rows) == 1:
        sys.exit(f"No test was run. The lowest versions are tested with {OLDEST_CPYTHON}, which was not found.")
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


def requirements(interpreter: Interpreter, version: str) -> list[str]:
    """Return what to install for the tests: a series of SQLAlchemy, or the lowest versions of pyproject.toml."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = pyproject["project"], pyproject["dependency-groups"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    needs = [*project["dependencies"], *extras, *groups["demo"], *groups["test"]]
    needs = [each for each in needs if isinstance(each, str)]
    if version == LOWEST:
        # An extra and a group that name different lowest versions of one package cannot be installed together.
        return [FLOOR.sub(r"==\1", each) for each in needs]
    if interpreter.without_asyncpg is not None:
        needs = [each for each in needs if not each.startswith("asyncpg")]
    if interpreter.free_threaded:
        # psycopg-binary has no wheel for a free-threaded Python. psycopg uses the libpq of the system.
        needs = [each.replace("psycopg[binary]", "psycopg") for each in needs]
    return [*needs, SQLALCHEMY[version]]


def environment(interpreter: Interpreter, folder: Path, wheel: Path, needs: list[str]) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        run(interpreter.path, "-m", "venv", "--without-pip", folder)
    # Install the newest release with a wheel. A newer release without one might not compile with this interpreter.
    wheels = ("--prefer-binary", "--only-binary=pydantic-core")
    pip(python, "install", *wheels, *needs)
    pip(python, "install", "--no-deps", "--force-reinstall", wheel)
    return python


def run_tests(python: Path, tests: list[str], log: Path, interpreter: Interpreter, name: str) -> tuple[list[Row], bool]:
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
        *(["-Xgil=0"] if interpreter.free_threaded else []),
        "-m",
        "pytest",
        "-q",
        *plugins,
        *options,
        *tests,
    ]
    start = time.monotonic()
    result = subprocess.run(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = f"{time.monotonic() - start:.0f}"
    log.write_text(result.stdout, encoding="utf-8")
    version = output(python, "-c", "import sqlalchemy; print(sqlalchemy.__version__)")
    rows = [
        Row(name, version, driver, backend, passed, failed, skipped, seconds)
        for backend, passed, failed, skipped in COUNTS.findall(result.stdout)
    ]
    if result.returncode or not rows:
        print(result.stdout[-4000:])
        failure = f"pytest failed with exit status {result.returncode}: see {log.relative_to(ROOT)}"
        rows.append(Row(name, version, driver, failure))
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
