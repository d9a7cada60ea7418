"""Remove the comments for the tests of the documentation from the pages: see examples/tests/test_docs.py.

The footer shows the version of the package.

A build fails if a page shows the fence of a code block, which Markdown did not recognize as one.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig, **_: object) -> None:
    manifest = Path(config.config_file_path).with_name("Cargo.toml")
    config.copyright = f"ctxalchemy {tomllib.loads(manifest.read_text(encoding='utf-8'))['package']['version']}"


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"^ *<!-- (?:run|not run).*?-->\n", "", markdown, flags=re.DOTALL | re.MULTILINE)


def on_post_page(output: str, page: Page, **_: object) -> None:
    if "```" in output:
        raise PluginError(f"{page.file.src_path} shows a literal fence: is the code block indented as its list or tab?")
