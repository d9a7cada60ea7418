"""Run the tests with each interpreter at hand, on the oldest and the newest SQLAlchemy, and print a table.

What is given goes to pytest.  Each combination has an environment of its own, with the package installed from a wheel,
as users have it; where there is no native module for an interpreter, the table says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from interpreters import Interpreter, interpreters

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "test-all"
SQLALCHEMY = {"2.0": "sqlalchemy[asyncio]>=2.0.40,<2.1", "2.1": "sqlalchemy[asyncio]>=2.1,<2.2"}
COUNTS = re.compile(r"^(native|python|neither) +(\d+) passed, (\d+) failed, (\d+) skipped$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    interpreter: str
    sqlalchemy: str
    backend: str
    passed: str = ""
    failed: str = ""
    skipped: str = ""
    seconds: str = ""

    def __str__(self) -> str:
        return (
            f"{self.interpreter:<18}{self.sqlalchemy:<12}{self.backend:<9}"
            f"{self.passed:>7}{self.failed:>8}{self.skipped:>9}{self.seconds:>9}"
        )


def main() -> None:
    print(f"-- Into {FOLDER.relative_to(ROOT)}: the output of each run, and the environments")
    good = True
    rows = [Row("Interpreter", "SQLAlchemy", "backend", "passed", "failed", "skipped", "seconds")]
    for interpreter in interpreters():
        if interpreter.without_native is not None:
            rows.append(Row(interpreter.name, "", f"not run: {interpreter.without_native}"))
            continue
        folder = FOLDER / interpreter.kind
        wheel = build(interpreter, folder)
        for series, requirement in SQLALCHEMY.items():
            say(f"{interpreter.name}, SQLAlchemy {series}")
            python = environment(interpreter, folder / series, wheel, requirement)
            found, passed = run_tests(python, folder / f"{series}.log", interpreter, series)
            rows += found
            good = good and passed
    print("", *rows, sep="\n")
    sys.exit(not good)


def build(interpreter: Interpreter, folder: Path) -> Path:
    say(f"{interpreter.name}: building")
    # All that is there is of an earlier state of the sources.
    for old in folder.glob("*.whl"):
        old.unlink()
    pip(interpreter.path, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


def environment(interpreter: Interpreter, folder: Path, wheel: Path, sqlalchemy: str) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        run(interpreter.path, "-m", "venv", "--without-pip", folder)
    pip(python, "install", "--group", f"{ROOT / 'pyproject.toml'}:test", sqlalchemy)
    pip(python, "install", "--no-deps", "--force-reinstall", wheel)
    return python


def run_tests(python: Path, log: Path, interpreter: Interpreter, series: str) -> tuple[list[Row], bool]:
    start = time.monotonic()
    # Neither a folder of the tree nor an environment variable is to take the place of what is installed.
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CTXALCHEMY_BACKEND")}
    command: list[str | Path] = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "scripts.both_backends",
        "-p",
        "no:cacheprovider",
        *sys.argv[1:],
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = f"{time.monotonic() - start:.0f}"
    log.write_text(result.stdout, encoding="utf-8")
    version = output(python, "-c", "import sqlalchemy; print(sqlalchemy.__version__)")
    rows = [
        Row(interpreter.name, version, backend, passed, failed, skipped, seconds)
        for backend, passed, failed, skipped in COUNTS.findall(result.stdout)
    ]
    if result.returncode or not rows:
        print(result.stdout[-4000:])
        rows.append(
            Row(interpreter.name, version, f"pytest failed, with {result.returncode}: see {log.relative_to(ROOT)}")
        )
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
