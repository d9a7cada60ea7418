"""A pytest plugin: count the tests of each backend, and fail a full run in which a backend had none.

Without it, a suite that silently lost one backend would still pass.  Where there is no native backend, that has to be
said, with the reason: ``--without-native=REASON``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKENDS = ("native", "python")
NEITHER = "neither"


class BothBackends:
    def __init__(self, config: pytest.Config) -> None:
        # Whether everything was asked for.  What is deselected is found out later.
        self._is_full_run = config.args == config.getini("testpaths")
        self._needed = BACKENDS if config.getoption("without_native") is None else ("python",)
        self._backends: dict[str, str] = {}
        self._outcomes: dict[str, str] = {}
        self._missing: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        backend = parameters.get("ctxalchemy", parameters.get("backend"))
        self._backends[item.nodeid] = backend if backend in BACKENDS else NEITHER

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        if items:
            self._is_full_run = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Of the three phases, the call's outcome counts, unless another one failed or was skipped.
        matters = report.when == "call" or report.outcome != "passed"
        if matters and self._outcomes.get(report.nodeid) != "failed":
            self._outcomes[report.nodeid] = report.outcome

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and self._is_full_run:
            counts = self._counts()
            self._missing = [backend for backend in self._needed if not counts[backend, "passed"]]
            if self._missing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("backends")
        counts = self._counts()
        for backend in (*BACKENDS, NEITHER):
            outcomes = (f"{counts[backend, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
            terminalreporter.line(f"{backend:<8}{', '.join(outcomes)}")
        for backend in self._missing:
            terminalreporter.line(f"No test passed on the {backend} backend, in a run of all tests.", red=True)

    def _counts(self) -> Counter[tuple[str, str]]:
        return Counter((self._backends.get(nodeid, NEITHER), outcome) for nodeid, outcome in self._outcomes.items())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-native", metavar="REASON", help="skip the native backend, for this reason")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(BothBackends(config))
