"""Skips that fail the run: with --check-skips, every reason that allowed_skips.py does not list.

A plugin of its own, so that it can be tested on small suites. tests/conftest.py loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest


class SkipCheck:
    """Collects the skips of tests and of whole modules; pytest-xdist's workers report both to the main process."""

    def __init__(self, allowed: Mapping[str, str]) -> None:
        self._allowed = allowed
        self.unexpected: set[tuple[str, str]] = set()

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        _, _, message = report.longrepr
        reason = message.removeprefix("Skipped: ")
        if not any(re.match(pattern, reason) for pattern in self._allowed):
            self.unexpected.add((report.nodeid, reason))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.unexpected:
            terminalreporter.section("skips that tests/allowed_skips.py does not list", red=True)
            for nodeid, reason in sorted(self.unexpected):
                terminalreporter.line(f"{nodeid}: {reason}")
            terminalreporter.line("Install or set what they ask for, or list the reason there and say why.")


def add_option(parser: pytest.Parser) -> None:
    """--check-skips"""
    text = "fail the run when a test is skipped for a reason that tests/allowed_skips.py does not list"
    parser.addoption("--check-skips", action="store_true", help=text)


def register(config: pytest.Config, allowed: Mapping[str, str]) -> None:
    """Look at the skips of this run, if it was asked for."""
    if config.getoption("--check-skips"):
        config.pluginmanager.register(SkipCheck(allowed), "skip-check")
