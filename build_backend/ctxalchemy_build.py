"""The build backend: maturin builds wheels with the native module, hatchling builds pure wheels and the sdist.

A pure wheel contains no native module. It is built on request and without Rust: ``CTXALCHEMY_PURE=1 pip install .``,
or ``pip install --config-settings=pure=true .``. If a native build fails, no pure wheel is built in its place.

The functions are the hooks of PEP 517 and PEP 660, with the names and parameters that the PEPs define. The hooks that
prepare metadata are optional and are omitted, as in hatchling under pip.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

Settings: TypeAlias = Mapping[str, Any] | None

NATIVE = ["maturin>=1.9,<2"]
PURE = ["hatchling>=1.27,<2"]

HINT = (
    "ctxalchemy: the build of the native module failed; the reason is above. To install ctxalchemy in pure Python, "
    "without Rust, set CTXALCHEMY_PURE=1 or pass --config-settings=pure=true."
)
NO_CARGO = (
    "ctxalchemy: cargo was not found. The build of the native module needs cargo of Rust 1.88 or newer. To install "
    "ctxalchemy in pure Python, without Rust, set CTXALCHEMY_PURE=1 or pass --config-settings=pure=true."
)

_VALUES = {"": False, "0": False, "false": False, "1": True, "true": True}


def _is_pure(settings: Settings) -> bool:
    """Return whether a pure wheel is requested. The setting takes precedence over the environment variable."""
    wanted = (settings or {}).get("pure", os.environ.get("CTXALCHEMY_PURE", ""))
    try:
        return _VALUES[str(wanted).lower()]
    except KeyError:
        sys.exit(f"ctxalchemy: CTXALCHEMY_PURE and the setting 'pure' must be 1, true, 0 or false, not {wanted!r}")


def _requires(settings: Settings) -> list[str]:
    if _is_pure(settings):
        return PURE
    if shutil.which("cargo") is None:
        sys.exit(NO_CARGO)
    return NATIVE


def _build(hook: str, directory: str, settings: Settings) -> str:
    """Run this hook of the requested builder."""
    rest = {name: value for name, value in (settings or {}).items() if name != "pure"}
    if _is_pure(settings):
        return _hook("hatchling.build", hook)(directory, rest)
    try:
        return _hook("maturin", hook)(directory, rest)
    except (Exception, SystemExit):
        print(HINT, file=sys.stderr, flush=True)
        raise


def _hook(builder: str, name: str) -> Callable[..., str]:
    hook: Callable[..., str] = getattr(import_module(builder), name)
    return hook


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requires(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requires(config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return PURE


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    return _build("build_wheel", wheel_directory, config_settings)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _build("build_editable", wheel_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return _hook("hatchling.build", "build_sdist")(sdist_directory)
