"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest

from tests import skips
from tests.allowed_skips import ALLOWED_SKIPS


def pytest_addoption(parser: pytest.Parser) -> None:
    skips.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    skips.register(config, ALLOWED_SKIPS)


@pytest.fixture(autouse=True)
def _environment_ends_with_the_test() -> Iterator[None]:
    """A variable that a test's code sets (megatron-core sets NVTE_*) is gone after it.

    Otherwise later tests depend on their order, and ranks that could be forked need fresh interpreters.
    """
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)
