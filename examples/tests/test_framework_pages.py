"""Paste each page about a framework into an empty folder, run its commands, and compare their output with the page."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .test_docs import BLOCK, DOCS, with_snippets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = sorted((DOCS / "frameworks").glob("*.md"))
PROGRAMS = {"uvicorn": [sys.executable, "-m", "uvicorn"], "python": [sys.executable]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_page_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    text = page.read_text(encoding="utf-8").replace("localhost:8000", f"localhost:{free_port()}")
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        if block["title"]:
            (tmp_path / block["title"]).write_text(with_snippets(block["code"]), encoding="utf-8")
    served = re.search(r"localhost:(\d+)", text)
    assert served is not None
    compared = 0
    (install, serve, *commands) = [block["code"] for block in blocks if block["language"] == "console"]
    assert install.startswith("$ pip install ")
    with server(serve.removeprefix("$ ").strip(), served[1], tmp_path):
        for command, output in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", "".join(commands), re.MULTILINE):
            if command.startswith("curl"):
                assert run([*shlex.split(command), "-s"]).strip() == output.strip()
                compared += 1
            else:
                program, *arguments = shlex.split(command)
                assert " 1 passed" in run([*PROGRAMS[program], *arguments])
    assert compared >= 3


@contextmanager
def server(command: str, port: str, folder: Path) -> Iterator[None]:
    """Start the server of a page, on a port that is free: port 8000 of the page may be in use."""
    program, *arguments = command.split()
    app = folder / "app.py"
    app.write_text(app.read_text(encoding="utf-8").replace("port=8000", f"port={port}"), encoding="utf-8")
    process = subprocess.Popen([*PROGRAMS[program], *arguments], env={**os.environ, "UVICORN_PORT": port})
    try:
        run(["curl", "-s", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", f"localhost:{port}/notes"])
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run(command: list[str]) -> str:
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
