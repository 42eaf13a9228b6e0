"""--check-skips on small suites: an unlisted reason fails the run, in one process and in pytest-xdist's workers."""

import re
from pathlib import Path

import pytest

from tests.allowed_skips import ALLOWED_SKIPS

pytest_plugins = ["pytester"]

CONFTEST = """
from tests.skips import add_option as pytest_addoption, register
def pytest_configure(config):
    register(config, {"no GPU": "there is none"})
"""
SUITE = """
import pytest
@pytest.mark.skipif(True, reason="no GPU here")
def test_listed(): ...
@pytest.mark.xfail(reason="known")
def test_known(): assert False
def test_passes(): ...
"""
LATE = "import pytest\ndef test_it():\n    pytest.skip('a tool is missing, no GPU needed')\n"
MODULE = "import pytest\npytest.importorskip('a_module_of_nobody', reason='a module is missing')\ndef test_it(): ...\n"


@pytest.fixture
def run(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # where `tests` is
    pytester.makeconftest(CONFTEST)

    def run(suites, *options):
        pytester.makepyfile(**suites)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)

    return run


def test_a_listed_reason_passes(run):
    """So does an expected failure."""
    run({"test_a": SUITE}, "--check-skips").assert_outcomes(passed=1, skipped=1, xfailed=1)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "workers"])
def test_an_unlisted_reason_fails_the_run(run, workers):
    """A skip within a test and one of a module, each named with its reason; the reason must match from its start."""
    result = run({"test_a": SUITE, "test_late": LATE, "test_module": MODULE}, "--check-skips", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*test_late.py::test_it: a tool is missing, no GPU needed", "test_module.py: a module is missing"]
    )
    assert "test_listed: " not in result.stdout.str()


def test_nobody_is_stopped_who_did_not_ask(run):
    """Without the option a skip is a skip."""
    assert run({"test_late": LATE}).ret == pytest.ExitCode.OK


def test_every_listed_reason_has_a_skip():
    """A line of the list that no test's reason matches any more goes."""
    from pathlib import Path

    files = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    reasons = [text for file in files for text in re.findall(r'(?:reason=|skip\()f?"([^"]+)"', file)]
    assert [p for p in ALLOWED_SKIPS if not any(re.match(p, reason) for reason in reasons)] == []
