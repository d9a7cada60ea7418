"""The build backend requires and runs the builder that the settings select, and explains errors."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "build_backend" / "ctxalchemy_build.py"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The build backend, on a machine with cargo and without ``CTXALCHEMY_PURE`` in the environment."""
    monkeypatch.delenv("CTXALCHEMY_PURE", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    spec = importlib.util.spec_from_file_location("ctxalchemy_build", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders that return their name, the hook and its arguments."""
    hooks = ("build_wheel", "build_editable", "build_sdist")
    for name in ("maturin", "hatchling.build"):
        calls = {hook: lambda *given, name=name, hook=hook: (name, hook, *given) for hook in hooks}
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**calls))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize(
    ("environment", "settings", "builder"),
    [
        (None, None, "maturin"),
        ("", {}, "maturin"),
        ("0", None, "maturin"),
        ("1", None, "hatchling"),
        ("true", {"other": "x"}, "hatchling"),
        (None, {"pure": "true"}, "hatchling"),
        (None, {"pure": "1"}, "hatchling"),
        ("1", {"pure": "false"}, "maturin"),
    ],
)
def test_selected_builder_is_required_and_run(
    backend: Any,
    builders: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    environment: str | None,
    settings: dict[str, str] | None,
    builder: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("CTXALCHEMY_PURE", environment)
    (requirement,) = getattr(backend, f"get_requires_for_build_{kind}")(settings)
    assert requirement.startswith(builder)
    module = "hatchling.build" if builder == "hatchling" else builder
    rest = {name: value for name, value in (settings or {}).items() if name != "pure"}
    assert getattr(backend, f"build_{kind}")("dist", settings, None) == (module, f"build_{kind}", "dist", rest)


def test_sdist_never_needs_rust(backend: Any, builders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert [each.partition(">")[0] for each in backend.get_requires_for_build_sdist()] == ["hatchling"]
    assert backend.build_sdist("dist", {}) == ("hatchling.build", "build_sdist", "dist")


def test_error_about_missing_cargo_names_the_pure_build(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match=r"cargo.*CTXALCHEMY_PURE=1"):
        backend.get_requires_for_build_wheel()
    assert backend.get_requires_for_build_wheel({"pure": "true"})


def test_failed_native_build_is_not_replaced_by_a_pure_build(
    backend: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        sys.exit(1)

    monkeypatch.setitem(sys.modules, "maturin", SimpleNamespace(build_wheel=fail))
    with pytest.raises(SystemExit):
        backend.build_wheel("dist")
    assert "CTXALCHEMY_PURE=1" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"pure": "yes"}, None])
def test_other_values_of_the_settings_are_refused(backend: Any, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    monkeypatch.setenv("CTXALCHEMY_PURE", "maybe")
    with pytest.raises(SystemExit, match="must be 1, true, 0 or false"):
        backend.get_requires_for_build_wheel(settings)
