"""Render the docstrings and the signatures of the package.

The docstring parser accepts only the plural heading ``Examples:``. A function that ``asynccontextmanager`` decorates
is shown as an async context manager, and not as an async function that returns an iterator. The attributes of modules
that have a description are types.
"""

from __future__ import annotations

from typing import Any

import griffe


class Api(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if "module-attribute" in attr.labels and attr.docstring is not None:
            attr.labels.remove("module-attribute")
            attr.labels.add("type")

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        returns = func.returns
        if not isinstance(returns, griffe.ExprSubscript) or not isinstance(returns.left, griffe.ExprName):
            return
        is_decorated = any(decorator.callable_path.endswith("asynccontextmanager") for decorator in func.decorators)
        if is_decorated or returns.left.name == "AbstractAsyncContextManager":
            func.labels.discard("async")
            func.labels.add("async context manager")
            returns.left.name = "AbstractAsyncContextManager"
