"""A pytest plugin that counts the tests of each backend and fails a full run in which no test passed on a backend.

Without the plugin, a suite that no longer runs on one of the backends would still pass. If an interpreter has no
native backend, pass the reason: ``--without-native=REASON``.

Load the plugin with ``-p tests.support.both_backends``, from the root of the repository.
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
        # True if pytest was started without paths. pytest_deselected() resets it if tests are deselected.
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
        # A test has three phases. Its outcome is that of the call, unless another phase failed or was skipped.
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
            terminalreporter.line(f"No test passed on the {backend} backend in a run of all tests.", red=True)

    def _counts(self) -> Counter[tuple[str, str]]:
        return Counter((self._backends.get(nodeid, NEITHER), outcome) for nodeid, outcome in self._outcomes.items())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-native", metavar="REASON", help="skip the native backend for this reason")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(BothBackends(config))
