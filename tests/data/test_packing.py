"""Best-fit decreasing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eaft_megatron.data.packing import best_fit_decreasing


def _naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook: look at every bin, take the fullest that fits, the newest of equals."""
    bins: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if left[b] >= lengths[item]]
        if fits:
            best = min(left[b] for b in fits)
            chosen = [b for b in fits if left[b] == best]
        else:
            bins.append([])
            left.append(capacity)
            chosen = [len(bins) - 1]
        bins[chosen[-1]].append(item)
        left[chosen[-1]] -= lengths[item]
    return bins


@given(st.lists(st.integers(1, 40), max_size=60))
@settings(max_examples=150, deadline=None)
def test_it_is_best_fit_decreasing(lengths):
    """As many bins, filled to the same heights, as the textbook's; every item in one bin; no bin too full."""
    actual = best_fit_decreasing(lengths, 40)
    assert sorted(item for items in actual for item in items) == list(range(len(lengths)))
    heights = [sum(lengths[item] for item in items) for items in actual]
    assert max(heights, default=0) <= 40
    expected = sorted(sum(lengths[item] for item in items) for items in _naive(lengths, 40))
    assert sorted(heights) == expected


def test_lengths_of_chats_leave_little_empty():
    """On long-tailed lengths more than 99% of 4096 positions are filled."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20000), 8, 4096).astype(int)
    packs = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / (len(packs) * 4096) > 0.99


@pytest.mark.parametrize("lengths", [[5, 11], [0, 3]])
def test_an_item_that_no_bin_holds_is_refused(lengths):
    """Too long or empty: the item and its length are named."""
    with pytest.raises(ValueError, match="item [01] has (11|0) tokens, outside 1 to 10"):
        best_fit_decreasing(lengths, 10)
