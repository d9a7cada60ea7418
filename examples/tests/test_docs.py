"""Run the code blocks of the documentation, page by page.

The blocks of a page share a namespace and an event loop, and may use ``await`` at the top level.  A block with a title
is also written to a file of that name.  If the file is a Python file, the block runs as a module.  Code in
``<!-- run ... -->`` is run but not shown on the page: it mostly checks the results of the blocks above it, and it adds
no source or configuration file that a reader of the page would not have.  A block that is not run has
``<!-- not run: reason -->`` on the line above it.
"""

from __future__ import annotations

import ast
import inspect
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "design" not in page.parts]
BLOCK = re.compile(
    r"(?:^<!-- run\n(?P<hidden>.*?)^-->$)"
    r"|(?:^(?P<indent> *)(?:<!-- not run: (?P<reason>[^\n]+) -->\n *)?"
    r"```(?P<language>[^\s`]*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<code>.*?)^ *```$)",
    re.DOTALL | re.MULTILINE,
)


@pytest.fixture
def page_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str, second_database_url: str
) -> Iterator[Path]:
    """An empty working folder for the code of a page, with two new databases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("AUDIT_DATABASE_URL", second_database_url)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
async def test_code_of_page_runs(page: Path, page_folder: Path) -> None:
    namespace = module("page")
    shown: set[str] = set()
    text = page.read_text(encoding="utf-8")  # noqa: ASYNC240 - no other task needs the event loop.
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("hidden" if block["hidden"] else "code"))
        where = f"{page}:{line}"
        if block["reason"]:
            continue
        code = block["hidden"] or inspect.cleandoc("\n" + block["code"])
        target = namespace
        if block["title"]:
            shown.add(block["title"])
            path = page_folder / block["title"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(with_snippets(code), encoding="utf-8")
            if path.suffix != ".py" or "--8<--" in code:
                continue
            target = module(path.stem, path)
        if "--8<--" in code:
            continue  # The block includes a file of the examples, which have their own tests.
        assert block["hidden"] or block["language"] == "python", f"{where}: neither Python nor marked as not run"
        await run("\n" * line + code, str(page), target)
        assert sources(page_folder) <= shown, f"{where}: the page does not show {sources(page_folder) - shown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_of_page_can_be_pasted_into_a_file(page: Path) -> None:
    """The tests may await outside a function, and a reader may not."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["language"] == "python" and not block["reason"]:
            compile(inspect.cleandoc("\n" + block["code"]), page.name, "exec")


def test_code_of_readme_runs(page_folder: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    titled = {block["title"]: block["code"] for block in BLOCK.finditer(text) if block["title"]}
    assert titled.keys() == {"app.py", "test_app.py"}
    for name, code in titled.items():
        (page_folder / name).write_text(code, encoding="utf-8")
    python = [sys.executable, "-m"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*python, "uvicorn", "app:app", "--port", str(port)])
    try:
        # The port of `uvicorn app:app` on the page may be in use.
        request = ["curl", "-s", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "-X", "POST"]
        added = subprocess.run(
            [*request, f"localhost:{port}/notes?text=hello"], check=True, capture_output=True, text=True
        )
        assert added.stdout == "1"
    finally:
        server.terminate()
        server.wait()
    for _ in range(2):  # The note of the test is rolled back, and the note of the request stays.
        ran = subprocess.run([*python, "pytest"], check=False, capture_output=True, text=True)
        assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
    # pytest and its plugins may create hidden folders.
    assert {path.name for path in page_folder.glob("[!.]*.*")} == {*titled, "notes.sqlite3"}


def test_documentation_pages_named_in_errors_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "python").rglob("*.py")))
    named = re.findall(r"""\bsee\(["']([^"'#]+)(?:#([^"']+))?""", sources)
    assert len(named) > 5
    for page, anchor in named:
        headings = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings]
        assert not anchor or anchor in slugs, f"{page}#{anchor}"


def with_snippets(code: str) -> str:
    """Return the code with the files that it includes, as the page shows it."""
    return re.sub(
        r'^--8<-- "(.+)"$',
        lambda included: (ROOT / included[1]).read_text(encoding="utf-8"),
        code,
        flags=re.MULTILINE,
    )


def sources(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in {".py", ".ini", ".toml", ".cfg"}}


def module(name: str, path: Path | None = None) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    if path is not None:
        module.__file__ = str(path)
    return module


async def run(code: str, name: str, target: ModuleType) -> None:
    compiled = compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, target.__dict__)
    if inspect.iscoroutine(result):
        await result
