"""The modules of the package form no import cycles, and private names of SQLAlchemy stay in one module."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "ctxalchemy"
MODULES = {
    ".".join(("ctxalchemy", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
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
