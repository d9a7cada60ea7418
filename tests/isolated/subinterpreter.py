"""Import the package in a subinterpreter, and print the loaded backend or the error.

The argument is the value of CTXALCHEMY_BACKEND in the subinterpreter.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

CODE = """
import os, sys
os.environ["CTXALCHEMY_BACKEND"] = {wanted!r}
try:
    # Use SQLAlchemy without its compiled parts, which do not load in a subinterpreter either.
    os.environ["DISABLE_SQLALCHEMY_CEXT_RUNTIME"] = "1"
    import ctxalchemy
    print("loaded", ctxalchemy.BACKEND)
except ImportError as error:
    # Print the original error: SQLAlchemy wraps the error of greenlet.
    print("ImportError:", error.__cause__ or error)
sys.stdout.flush()
"""

if __name__ == "__main__":
    import_module("ctxalchemy")
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    subinterpreters: Any = import_module(name)
    interpreter = subinterpreters.create()
    failed = subinterpreters.run_string(interpreter, CODE.format(wanted=sys.argv[1]))
    if failed is not None:
        print(failed)
    subinterpreters.destroy(interpreter)
