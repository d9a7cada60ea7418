"""Before a release, links, error messages and the metadata of the package get the address of the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/set_addresses.py"
ERRORS = "python/ctxalchemy/_errors.py"
REPOSITORY = "https://example.org/owner/name"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Cargo.toml", "README.md", "pyproject.toml", ERRORS, SCRIPT):
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    return tmp_path


def set_addresses(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, checkout / SCRIPT, REPOSITORY], check=False, capture_output=True, text=True)


def test_readme_links_to_files_of_the_version(checkout: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set_addresses(checkout).returncode == 0
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
    replaced = re.findall(r"\]\(([^)]+)\)", (checkout / "README.md").read_text(encoding="utf-8"))
    for before, after in zip(links, replaced, strict=True):
        folder = "raw" if before.endswith(".svg") else "blob"
        assert after == f"{REPOSITORY}/{folder}/v{version}/{before}"
        assert (ROOT / before.partition("#")[0]).exists()


def test_error_message_names_an_address(checkout: Path) -> None:
    set_addresses(checkout)
    code = f"import runpy; print(runpy.run_path({str(checkout / ERRORS)!r})['no_context']())"
    message = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    (address,) = re.findall(rf"see {REPOSITORY}/blob/v[^/]+/(\S+)", message)
    assert (ROOT / address.partition("#")[0]).is_file()


def test_metadata_has_addresses(checkout: Path) -> None:
    before = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    set_addresses(checkout)
    after = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    urls = after["project"].pop("urls")
    assert urls["Repository"] == REPOSITORY
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    assert after == before


def test_addresses_are_not_set_twice(checkout: Path) -> None:
    assert set_addresses(checkout).returncode == 0
    again = set_addresses(checkout)
    assert again.returncode == 1
    assert "README.md has nothing to replace" in again.stderr
