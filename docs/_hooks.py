"""Remove the comments for the tests of the documentation from the pages: see examples/tests/test_docs.py."""

from __future__ import annotations

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"<!-- (?:run|not run).*?-->\n", "", markdown, flags=re.DOTALL)
