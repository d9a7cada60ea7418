"""Build the sdist, the pure wheel and a native wheel for each interpreter of this machine into dist, and check them.

The wheels are built from the sdist by the build backend of this project. The pure wheel is built without cargo on PATH.

The script checks what PyPI checks, the files and the metadata, and which wheel pip chooses on several platforms. It
then installs each wheel in a separate environment and runs the checks of the example.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path

from interpreters import Interpreter, interpreters

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
PURE = f"ctxalchemy-{VERSION}-py3-none-any.whl"
SDIST = f"ctxalchemy-{VERSION}.tar.gz"
DIST_INFO = f"ctxalchemy-{VERSION}.dist-info"
FOLDERS = ("build_backend", "python", "rust")
FILES = (".gitignore", "CHANGELOG.md", "Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "build.rs", "pyproject.toml")

FOREIGN = ("Linux", "manylinux2014_x86_64") if sys.platform == "darwin" else ("macOS", "macosx_14_0_arm64")
# Platforms for which no native wheel is built here, as options of pip. pip must choose the pure wheel for them.
OTHER_PLATFORMS = {
    "PyPy 3.11, Linux": ["--implementation=pp", "--python-version=3.11", "--platform=manylinux2014_x86_64"],
    "CPython 3.13, musl": ["--implementation=cp", "--python-version=3.13", "--platform=musllinux_1_2_x86_64"],
    f"CPython 3.13, {FOREIGN[0]}": ["--implementation=cp", "--python-version=3.13", f"--platform={FOREIGN[1]}"],
    "CPython 3.10 (refused)": ["--implementation=cp", "--python-version=3.10", "--platform=manylinux2014_x86_64"],
}


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    found = interpreters()
    build_sdist()
    build(sys.executable, {"CTXALCHEMY_PURE": "1", "PATH": path_without_cargo()})
    native = {each: build_native(each) for each in found if each.without_native is None}

    say("Checking the files and the metadata")
    check_files(native)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())

    rows = [(platform, chosen(sys.executable, options), "") for platform, options in OTHER_PLATFORMS.items()]
    expect([choice for _, choice, _ in rows], [PURE, PURE, PURE, "nothing"], "the wheels that pip chooses")
    for each in found:
        wheel = native.get(each, PURE)
        expect(chosen(each.path), wheel, f"the wheel that pip chooses for {each.name}")
        rows.append((each.name, wheel, try_out(each, wheel)))
    first = found[0]
    rows.append((first.name, PURE, try_out(first, PURE)))

    print()
    for platform, wheel, outcome in rows:
        print(f"{platform:<28}{wheel:<78}{outcome}")


def build_sdist() -> None:
    say("Building the sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)


def build(python: str, environment: Mapping[str, str], *options: str) -> None:
    say(f"Building a wheel with {python}")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", DIST, *options, DIST / SDIST, environment=environment)


def build_native(interpreter: Interpreter) -> str:
    """Build the native wheel for this interpreter and return its name."""
    before = set(DIST.iterdir())
    # A common target folder, so that crates that all wheels need are compiled once.
    environment = {"CARGO_TARGET_DIR": str(ROOT / "target" / "wheels")}
    options = []
    if sys.platform == "linux":
        # zig links against the C library version of manylinux2014. maturin checks the result.
        environment["CARGO_ZIGBUILD_ZIG_PATH"] = str(distribution("ziglang").locate_file("ziglang/zig"))
        options = ["--config-settings=build-args=--compatibility manylinux2014 --zig"]
    build(interpreter.path, environment, *options)
    (wheel,) = set(DIST.iterdir()) - before
    return wheel.name


def check_files(native: Mapping[Interpreter, str]) -> None:
    """Compare the files of the sdist and of each wheel with the repository, and their metadata with each other."""
    with tarfile.open(DIST / SDIST) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    expect(found, {"PKG-INFO", *FILES, *sources(*FOLDERS)}, SDIST)

    package = {path.removeprefix("python/") for path in sources("python")}
    info = {f"{DIST_INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    expect(names(PURE), package | info, PURE)
    metadata = metadata_of(PURE)
    for interpreter, wheel in native.items():
        minor = "".join(map(str, interpreter.version[:2]))
        tag = f"cp{minor}-cp{minor}{'t' if interpreter.free_threaded else ''}-"
        expect(wheel.startswith(f"ctxalchemy-{VERSION}-{tag}"), True, f"the tag of {wheel}")
        if sys.platform == "linux":
            expect("manylinux2014" in wheel, True, f"the tag of {wheel}")
        extra = names(wheel) - package - info
        modules = {name for name in extra if name.startswith("ctxalchemy/_native.")}
        expect(len(modules), 1, f"the number of native modules in {wheel}")
        # maturin adds a list of the crates that are linked into the module.
        expect(extra - modules, {f"{DIST_INFO}/sboms/ctxalchemy.cyclonedx.json"}, wheel)
        expect(metadata_of(wheel), metadata, f"the metadata of {wheel}")


def sources(*folders: str) -> set[str]:
    """Return the files in these folders, without build products."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    ours = {path for path in paths if path.is_file() and path.suffix not in (".so", ".pyd", ".pyc")}
    return {path.relative_to(ROOT).as_posix() for path in ours}


def names(wheel: str) -> set[str]:
    return set(zipfile.ZipFile(DIST / wheel).namelist())


def metadata_of(wheel: str) -> list[tuple[str, str]]:
    """Return the metadata in a normalized form, because maturin and hatchling write it differently."""
    with zipfile.ZipFile(DIST / wheel) as archive:
        message = email.message_from_bytes(archive.read(f"{DIST_INFO}/METADATA"))
    fields = [(name, plain(name, value)) for name, value in message.items()]
    return sorted([*fields, ("Description", str(message.get_payload()).strip())])


def plain(name: str, value: str) -> str:
    if name == "Keywords":
        return ",".join(sorted(value.split(",")))
    if name == "Description-Content-Type":
        return value.partition(";")[0]
    if name == "Requires-Dist":
        requirement, _, condition = value.replace(" ", "").replace('"', "'").partition(";")
        return ",".join(sorted(requirement.replace("]", "],").split(","))) + condition
    return value


def chosen(python: str, options: Iterable[str] = ()) -> str:
    """Return the name of the wheel that pip chooses from dist, or ``nothing``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--python", python, "download", "--quiet", "--no-deps", "--no-index"]
        command += ["--only-binary=:all:", f"--find-links={DIST}", f"--dest={folder}", *options, "ctxalchemy"]
        failed = subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode
        return "nothing" if failed else next(Path(folder).iterdir()).name


def try_out(interpreter: Interpreter, wheel: str) -> str:
    """Run the checks of the example in an environment that contains only this wheel and what the example needs."""
    say(f"Trying {wheel} with {interpreter.name}")
    # The demo uses SQLite, so it does not need asyncpg, which may have no wheel for this interpreter.
    needs = [each for each in GROUPS["demo"] if not each.startswith("asyncpg")]
    backend = "python" if wheel == PURE else "native"
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        run(interpreter.path, "-m", "venv", "--without-pip", folder)
        # Install the newest release with a wheel. A newer one might not compile with this interpreter.
        wheels = ("--prefer-binary", "--only-binary=pydantic-core")
        run(sys.executable, "-m", "pip", "--python", python, "install", *wheels, DIST / wheel, *needs)
        environment = {"CTXALCHEMY_BACKEND": "auto", "DATABASE_URL": "", "PYTHONPATH": ""}
        code = "import ctxalchemy; print(ctxalchemy.BACKEND, ctxalchemy.__file__)"
        loaded, file = output(python, "-c", code, environment=environment).split()
        expect((loaded, Path(file).is_relative_to(folder)), (backend, True), f"what {wheel} installs")
        if interpreter.without_greenlet is not None:
            return f"{backend}: imported only, because {interpreter.without_greenlet}"
        last = output(python, ROOT / "examples" / "demo.py", environment=environment).splitlines()[-1]
        return f"{backend}: {last}"


def path_without_cargo() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if shutil.which("cargo", path=folder) is None)


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        if isinstance(found, set) and isinstance(wanted, set):
            found, wanted = set[object](found) - wanted, set[object](wanted) - found
        sys.exit(f"{what}: expected\n{wanted}\nbut found\n{found}")


def output(*command: str | Path, environment: Mapping[str, str]) -> str:
    result = subprocess.run(
        command, cwd=tempfile.gettempdir(), env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nThis command failed: {' '.join(map(str, command))}")
    return result.stdout


def run(*command: str | Path, environment: Mapping[str, str] | None = None) -> None:
    quiet = {"PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(command, env={**os.environ, **quiet, **(environment or {})}, stdout=subprocess.DEVNULL)
    if result.returncode:
        sys.exit(f"This command failed: {' '.join(map(str, command))}")


def say(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    main()
