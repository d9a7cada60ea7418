"""Build ``floors.c`` if a C compiler is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from .measure import warn


def build() -> Any:
    """Return the module, or None if it cannot be built."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        warn("no C compiler: the floors of the interpreter are not measured")
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"floors{sysconfig.get_config_var('EXT_SUFFIX')}"
        source = Path(__file__).with_name("floors.c")
        command = [compiler, "-O2", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source)]
        try:
            subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            warn(f"the floors of the interpreter could not be built: {error.stderr[-500:]}")
            return None
        spec = importlib.util.spec_from_file_location("floors", target)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
