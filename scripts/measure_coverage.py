"""Measure which lines and branches of the Python and of the Rust the tests execute, on both backends.

    python scripts/measure_coverage.py [--need-rust] [ARGUMENT OF PYTEST]...

The script builds the native module with instrumentation, copies the package and this module to target/coverage/package,
and runs the tests of Python on the copy. It then runs the tests of the Rust crate. The extension in the tree stays as
it is.

The results are in target/coverage/results: python.lcov, rust.lcov, and both in lcov.info.

The Rust part needs llvm-profdata and llvm-cov: those of ``rustup component add llvm-tools``, or those of the
operating system (``apt-get install llvm-19``). Older versions may not read the profiles of the compiler. If the
programs are missing, the script measures the Python only and reports it, or fails with --need-rust.

Not measured: processes that tests start with ``python -I``, which import the package in the tree.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "target" / "coverage"
PACKAGE = TARGET / "package"
PROFILES = TARGET / "profiles"
RESULTS = TARGET / "results"
RUST_FLAGS = "-C instrument-coverage"
# The sources of dependencies and of the standard library.
OTHER_SOURCES = r"/(\.cargo|registry|rustc|rustlib)/"
NO_LLVM = (
    "llvm-profdata and llvm-cov were not found: the Rust is NOT measured. "
    "Run 'rustup component add llvm-tools', or install the package llvm-19."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the coverage of the Python and of the Rust.")
    parser.add_argument("--need-rust", action="store_true", help="fail if the Rust cannot be measured")
    options, pytest_arguments = parser.parse_known_args()
    llvm = find_llvm()
    if llvm is None and options.need_rust:
        sys.exit(NO_LLVM)

    for folder in (PACKAGE, PROFILES, RESULTS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    copy_package(with_native_module=llvm is None)
    module = build_native_module() if llvm is not None else None
    failed = run_python_tests(pytest_arguments)
    reports = [report_python()]
    if llvm is not None and module is not None:
        reports.append(report_rust(llvm, module, run_rust_tests()))
    else:
        say(NO_LLVM)
    result = RESULTS / "lcov.info"
    result.write_text("".join(each.read_text(encoding="utf-8") for each in reports), encoding="utf-8")
    say(f"The result is in {result.relative_to(ROOT)}")
    sys.exit(failed)


def copy_package(*, with_native_module: bool) -> None:
    patterns = ["__pycache__"] if with_native_module else ["__pycache__", "_native*.so", "_native*.pyd"]
    shutil.copytree(ROOT / "python" / "ctxalchemy", PACKAGE / "ctxalchemy", ignore=shutil.ignore_patterns(*patterns))


def build_native_module() -> Path:
    say("Building the native module with instrumentation")
    options = ["--lib", "--crate-type", "cdylib", *cargo_options()]
    run("cargo", "rustc", *options, environment=rust_environment() | {"PYO3_BUILD_EXTENSION_MODULE": "1"})
    libraries = (TARGET / rust_host() / "debug").glob("libctxalchemy.*")
    (built,) = [each for each in libraries if each.suffix in (".so", ".dylib")]
    return Path(shutil.copy(built, PACKAGE / "ctxalchemy" / "_native.so"))


def run_python_tests(arguments: list[str]) -> bool:
    """Run the tests with coverage.py and return whether one failed."""
    say("Running the tests of Python")
    command = [sys.executable, "-m", "coverage", "run", f"--source={PACKAGE}", f"--data-file={RESULTS / 'run.data'}"]
    command += ["-m", "pytest", "-p", "tests.support.both_backends", "-p", "no:cacheprovider", *arguments]
    environment = {"PYTHONPATH": str(PACKAGE), "LLVM_PROFILE_FILE": str(PROFILES / "python-%p-%m.profraw")}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode != 0


def report_python() -> Path:
    data, report = RESULTS / "python.data", RESULTS / "python.lcov"
    # The copy of the package counts as the package itself: see [tool.coverage.paths].
    run(sys.executable, "-m", "coverage", "combine", "--quiet", f"--data-file={data}", RESULTS / "run.data")
    run(sys.executable, "-m", "coverage", "report", f"--data-file={data}")
    run(sys.executable, "-m", "coverage", "lcov", "--quiet", f"--data-file={data}", "-o", report)
    return report


def run_rust_tests() -> Path:
    """Run the tests of the crate and return the program that contains them."""
    say("Running the tests of Rust")
    test = ["cargo", "test", "--lib", *cargo_options()]
    environment = rust_environment() | {"LLVM_PROFILE_FILE": str(PROFILES / "rust-%p-%m.profraw")}
    run(*test, environment=environment)
    messages = run(*test, "--no-run", "--quiet", "--message-format=json", environment=environment, capture=True)
    (program,) = re.findall(r'"executable":"([^"]+)"', messages)
    return Path(program)


def report_rust(llvm: tuple[str, str], module: Path, tests: Path) -> Path:
    profdata, cov = llvm
    merged, report = RESULTS / "rust.profdata", RESULTS / "rust.lcov"
    run(profdata, "merge", "--sparse", *PROFILES.glob("*.profraw"), "-o", merged)
    options: list[str | Path] = [
        module,
        "-object",
        tests,
        f"--instr-profile={merged}",
        f"--ignore-filename-regex={OTHER_SOURCES}",
    ]
    print(run(cov, "report", *options, capture=True))
    exported = run(cov, "export", "--format=lcov", *options, capture=True)
    report.write_text(exported.replace(f"SF:{ROOT}/", "SF:"), encoding="utf-8")
    return report


def find_llvm() -> tuple[str, str] | None:
    """Return llvm-profdata and llvm-cov: those of the Rust toolchain, or else the newest ones on this machine."""
    host, sysroot = rust_host(), run("rustc", "--print", "sysroot", capture=True).strip()
    folders = [Path(sysroot, "lib", "rustlib", host, "bin")]
    versions = Path("/usr/lib").glob("llvm-*/bin")
    folders += sorted(versions, key=lambda path: [int(each) for each in re.findall(r"\d+", str(path))], reverse=True)
    folders += map(Path, os.get_exec_path())
    for folder in folders:
        found = [shutil.which(name, path=folder) for name in ("llvm-profdata", "llvm-cov")]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def rust_host() -> str:
    (host,) = re.findall(r"^host: (.*)$", run("rustc", "-vV", capture=True), re.MULTILINE)
    return str(host)


def cargo_options() -> list[str | Path]:
    # With --target, the flags do not apply to build scripts and macros, which would write profiles as well.
    return ["--target", rust_host(), "--target-dir", TARGET]


def rust_environment() -> dict[str, str]:
    return {"RUSTFLAGS": RUST_FLAGS, "PYO3_PYTHON": sys.executable}


def run(
    *command: str | Path,
    environment: dict[str, str] | None = None,
    capture: bool = False,
) -> str:
    """Run a command and return its output if it is to be captured. Exit if the command fails."""
    output = subprocess.PIPE if capture else None
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, text=True, stdout=output)
    if result.returncode:
        sys.exit(f"This command failed: {' '.join(map(str, command))}")
    return result.stdout or ""


def say(message: str) -> None:
    print(f"-- {message}", flush=True)


if __name__ == "__main__":
    main()
