"""Write the address of the repository into what a release contains: ``set_addresses.py https://github.com/OWNER/NAME``.

The README links to files of the repository, and error messages name pages of the documentation, both by their paths. A
reader of the package index and a user of an installed package do not have these files. The workflow that builds the
wheels runs this script in its checkout. Do not commit the result.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(repository: str) -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
    files, pictures = f"{repository}/blob/v{version}/", f"{repository}/raw/v{version}/"
    urls = f"""\
[project.urls]
Documentation = "{files}docs/index.md"
Repository = "{repository}"
Changelog = "{files}CHANGELOG.md"

"""
    relative = r"(?=\w[^():\s]*\))"
    replace("README.md", rf"(!\[[^\]]*\]\(){relative}", rf"\1{pictures}")
    replace("README.md", rf"(\]\(){relative}", rf"\1{files}")
    replace("pyproject.toml", r"^(?=\[project\.optional-dependencies\])", urls)
    replace("python/ctxalchemy/_errors.py", r'^(DOCUMENTATION = ")(?=docs/"$)', rf"\1{files}")


def replace(name: str, pattern: str, replacement: str) -> None:
    path = ROOT / name
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not count:
        sys.exit(f"{name} has nothing to replace: were the addresses set before?")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
