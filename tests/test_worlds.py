"""What the fixtures of shared worlds promise."""

import pytest

from tests.worlds import once


def test_a_world_runs_once_and_fails_once():
    """Every case gets the same value, or the same error, for one call with the same arguments."""
    calls = []

    def run(size):
        calls.append(size)
        if size > 1:
            raise RuntimeError(f"a world of {size} failed")
        return [size]

    world = once(run)
    assert world(1) is world(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a world of 2 failed"):
            world(2)
    assert calls == [1, 2]
