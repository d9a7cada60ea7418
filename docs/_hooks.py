"""Remove the comments for the tests of the documentation from the pages: see examples/tests/test_docs.py.

A build fails if a page shows the fence of a code block, which Markdown did not recognize as one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"^ *<!-- (?:run|not run).*?-->\n", "", markdown, flags=re.DOTALL | re.MULTILINE)


def on_post_page(output: str, page: Page, **_: object) -> None:
    if "```" in output:
        raise PluginError(f"{page.file.src_path} shows a literal fence: is the code block indented as its list or tab?")
