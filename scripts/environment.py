"""Set up .venv: install dependency groups, and the package itself in editable mode.

    python scripts/environment.py [--need-native] GROUP...

A step runs only if its inputs have changed. The script compares contents, not time stamps. It removes an extension
that was not built from the current sources before it builds a new one, so a stale extension is never tested.

If cargo is missing, the script installs the package without its extension. With --need-native, it fails instead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:
    sys.exit(f"Python 3.11 or newer is needed, but this is {sys.version.split()[0]}: run 'make PYTHON=python3.11 ...'")

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PACKAGE = ROOT / "python" / "ctxalchemy"
NO_CARGO = (
    "cargo was not found. This command needs the native backend: "
    "install Rust with rustup, or install the packages cargo, rustfmt and rust-clippy."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Set up .venv.")
    parser.add_argument("--need-native", action="store_true", help="fail if the extension cannot be built")
    parser.add_argument("groups", nargs="+", metavar="GROUP", help="a dependency group of pyproject.toml")
    options = parser.parse_args()
    has_cargo = shutil.which("cargo") is not None
    if options.need_native and not has_cargo:
        sys.exit(NO_CARGO)

    make_venv()
    for group in options.groups:
        install_group(group)
    install_package(has_cargo=has_cargo)


def make_venv() -> None:
    """Create .venv again if it belongs to another Python, or if it was moved."""
    wanted = digest(text=f"{sys.version} {sys.base_prefix} {VENV}")
    if is_done("venv", wanted):
        return
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit("This Python cannot create virtual environments: install the package python3-venv.")
    say(f"Creating .venv with Python {sys.version.split()[0]}")
    remove_extensions()
    venv.create(VENV, clear=True, with_pip=True)
    pip("install", "--upgrade", "pip>=25.1")  # The first release with --group.
    mark_done("venv", wanted)


def install_group(group: str) -> None:
    wanted = digest(PYPROJECT)
    if is_done(f"group-{group}", wanted):
        return
    say(f"Installing the dependencies and the dependency group {group!r}")
    pip("install", *read("pyproject.toml")["project"]["dependencies"], "--group", group)
    mark_done(f"group-{group}", wanted)


def install_package(*, has_cargo: bool) -> None:
    sources = digest(PYPROJECT, *rust_sources())
    if extensions() and is_done("native", digest(*extensions(), text=sources)):
        return
    remove_extensions()
    if has_cargo:
        say("Building the native extension")
        # Cargo compares time stamps. It would reuse an old build if the time stamp of a changed source is older.
        run("cargo", "clean", "--quiet", "--release", "--package", read("Cargo.toml")["package"]["name"])
        pip("install", "--no-deps", "--editable", str(ROOT))
        if len(extensions()) != 1:
            sys.exit(f"The build should have created one extension in {PACKAGE}, but created {len(extensions())}.")
        mark_done("native", digest(*extensions(), text=sources))
    elif not is_done("pure", digest(PYPROJECT)):
        say("cargo was not found: installing the package without its native extension, on the pure-Python backend")
        pip("install", "--no-deps", "--editable", str(ROOT), "--config-settings=pure=true")
        mark_done("pure", digest(PYPROJECT))


def rust_sources() -> list[Path]:
    """Return all files from which the extension is built."""
    names = ["Cargo.toml", "Cargo.lock", "build.rs", "rust-toolchain.toml", ".cargo/config.toml"]
    return [*(ROOT / name for name in names), *(ROOT / "rust").rglob("*")]


def extensions() -> list[Path]:
    return sorted([*PACKAGE.glob("_native*.so"), *PACKAGE.glob("_native*.pyd")])


def remove_extensions() -> None:
    for extension in extensions():
        extension.unlink()


def digest(*paths: Path, text: str = "") -> str:
    """Return the hash of a text, and of the names and contents of the paths. Paths that are not files are skipped."""
    total = hashlib.sha256(text.encode())
    for path in sorted(path for path in paths if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"\n{path.relative_to(ROOT)} {content}".encode())
    return total.hexdigest()


def is_done(step: str, wanted: str) -> bool:
    stamp = VENV / "done" / step
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted


def mark_done(step: str, wanted: str) -> None:
    stamp = VENV / "done" / step
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(wanted)


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def pip(*arguments: str) -> None:
    run(PYTHON, "-m", "pip", *arguments)


def run(*command: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CONDA_PREFIX"}
    environment |= {"VIRTUAL_ENV": str(VENV), "PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if result.returncode:
        sys.exit(f"This command failed: {' '.join(map(str, command))}")


def say(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    main()
