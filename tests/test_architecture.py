"""The imports of the package form no cycles, and private names of SQLAlchemy stay in one module.

The figure and the graph in the description of the architecture have all modules, and the graph has their imports.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "ctxalchemy"
MODULES = {
    ".".join(("ctxalchemy", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
FIGURE = (ROOT / "docs" / "assets" / "architecture.svg").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
# The modules of each layer, from the top to the bottom of the figure.
LAYERS = [re.findall(r'class="module"[^>]*>(\w+)<', layer) for layer in FIGURE.split('<g class="layer">')[1:]]
PRIVATE_NAMES_ALLOWED = "ctxalchemy._sqlalchemy.internals"


def imports(module: str) -> list[tuple[str, str | None]]:
    """Return all imports of a module, as pairs of an absolute module name and the imported name, if there is one.

    Imports in functions and under ``TYPE_CHECKING`` are included.
    """
    path = MODULES[module]
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            if node.level:
                parents = parents[: len(parents) - node.level + (path.stem == "__init__")]
            source = ".".join((*(parents if node.level else ()), *filter(None, (node.module,))))
            found += [(source, alias.name) for alias in node.names]
    return found


def imported_modules(module: str) -> set[str]:
    """Return the modules of the package that a module imports.

    ``from . import name`` imports the module ``name``, if there is one, and otherwise the package.
    """
    found = set()
    for source, name in imports(module):
        submodule = f"{source}.{name}"
        found.add(submodule if submodule in MODULES else source)
    return found & MODULES.keys()


def test_modules_form_no_import_cycles() -> None:
    graph = {module: imported_modules(module) for module in MODULES}
    assert "ctxalchemy._errors" in graph["ctxalchemy._sqlalchemy.session"], "relative imports are not resolved"
    assert "ctxalchemy._complete" in graph["ctxalchemy._api"], "'from . import' is not resolved"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib lists the imported module before the module that imports it.
        cycle = " imports ".join(reversed(error.args[1]))
        raise AssertionError(f"import cycle: {cycle}") from None


def test_private_names_of_sqlalchemy_are_imported_in_one_module_only() -> None:
    """Ruff's rule SLF001 refuses private attributes; it does not check imports."""
    private = {
        module
        for module in MODULES
        for source, name in imports(module)
        if source.partition(".")[0] == "sqlalchemy"
        and any(part.startswith("_") and not part.endswith("__") for part in (*source.split("."), name or ""))
    }
    assert private == {PRIVATE_NAMES_ALLOWED}


def described_imports() -> dict[str, set[str]]:
    """Return the imports of each module without those of the shared helpers, with the names of the figure.

    The native module is written in Rust. It takes its signatures and docstrings from the pure-Python implementation.
    """
    graph = {"_native": {"_pure"}}
    for module in MODULES.keys() - {"ctxalchemy", "ctxalchemy._sqlalchemy"}:
        found = {each.rpartition(".")[2] for each in imported_modules(module)}
        graph[module.rpartition(".")[2]] = found - {"_sqlalchemy", "ctxalchemy", *LAYERS[-1]}
    graph["_backend"].add("_native")
    return graph


def with_their_imports(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the modules that each module imports, directly and indirectly."""
    found: dict[str, set[str]] = {}
    for module in TopologicalSorter(graph).static_order():
        direct = graph.get(module, set())
        found[module] = direct.union(*(found[each] for each in direct))
    return found


def test_figure_has_all_modules_in_layers_that_import_only_lower_layers() -> None:
    imports_of = described_imports()
    layer_of = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    assert sorted(module for layer in LAYERS for module in layer) == sorted(imports_of)
    upwards = {(a, b) for a, found in imports_of.items() for b in found if layer_of[a] > layer_of[b]}
    assert upwards == set()


def test_graph_of_imports_is_that_of_the_code() -> None:
    _, _, rest = PAGE.partition("```mermaid\nflowchart TD\n")
    arrows = re.findall(r"(\w+) --> (\w+)", rest.partition("```")[0])
    drawn: dict[str, set[str]] = {}
    for importer, imported in arrows:
        drawn.setdefault(importer, set()).add(imported)
    imports_of = described_imports()
    assert {(a, b) for a, b in arrows if b not in imports_of[a]} == set(), "these modules do not import each other"
    wanted, found = with_their_imports(imports_of), with_their_imports(drawn)
    missing = {(a, b) for a, below in wanted.items() for b in below - found.get(a, set())}
    assert missing == set(), "the graph has no path between these modules"
    implied = [(a, b) for a, b in arrows if any(b in found[other] for other in drawn[a] - {b})]
    assert implied == [], "these arrows follow from other arrows"
    assert len(arrows) == len(set(arrows))


def test_table_of_modules_has_all_modules() -> None:
    table = "".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+)`", table)}
    assert described_imports().keys() - named == set()
