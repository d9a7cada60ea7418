"""A plain-text table, with colours if the output is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

RED, GREEN, BOLD, DIM = "31", "32", "1", "2"


def paint(text: str, colour: str) -> str:
    """Colour the text if the output is a terminal and ``NO_COLOR`` (https://no-color.org) is not set."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{colour}m{text}\033[0m"


class Table:
    """Prints each row at once, in columns of the given widths."""

    def __init__(self, **columns: int) -> None:
        self._widths = tuple(columns.values())
        titles = [name.replace("_", " ").capitalize() for name in columns]
        print(paint(self._line(titles), BOLD))
        print(paint("  ".join("-" * width for width in self._widths), DIM))

    def row(self, *cells: str, good: bool) -> None:
        """Print a row. Its last cell says whether the result is as promised."""
        *others, last = self._line([*cells, "as promised" if good else "NOT AS PROMISED"]).rpartition("  ")
        print("".join(others) + paint(last, GREEN if good else RED), flush=True)

    def _line(self, cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)).rstrip()
