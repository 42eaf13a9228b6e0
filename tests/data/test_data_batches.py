"""The order of samples: a function of its arguments, resumable, the same for every split over ranks."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eaft_megatron.data import micro_batch_indices


def stream(n_samples: int, seed: int, global_batch: int, iterations: int, start: int = 0) -> list[int]:
    """Sample indices in order, one rank, micro-batches of 1."""
    batches = (
        micro_batch_indices(n_samples, seed, start + i * global_batch, global_batch, 1, 0, 1) for i in range(iterations)
    )
    return [index for batch in batches for micro_batch in batch for index in micro_batch]


sizes = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(n_samples=sizes, global_batch=sizes, seed=st.integers(0, 2**40), start=st.integers(0, 60))
def test_resume_is_the_tail_and_every_epoch_a_permutation(n_samples, global_batch, seed, start):
    """From any consumed_samples the order continues as if never interrupted; epochs miss and repeat nothing."""
    iterations = -(-(start + 4 * n_samples) // global_batch) + 2
    expected = stream(n_samples, seed, global_batch, iterations)
    actual = stream(n_samples, seed, global_batch, 2, start)
    assert actual == expected[start : start + len(actual)]
    for epoch in range(4):
        assert sorted(expected[epoch * n_samples : (epoch + 1) * n_samples]) == list(range(n_samples))


@settings(max_examples=60, deadline=None)
@given(
    n_samples=st.integers(1, 40), micro=st.integers(1, 4), dp_size=st.integers(1, 4), count=st.integers(1, 4),
    consumed=st.integers(0, 100),
)  # fmt: skip
def test_ranks_partition_the_global_batch(n_samples, micro, dp_size, count, consumed):
    """Micro-batch k over all ranks is the k-th stretch of the single-rank order."""
    size = micro * dp_size * count
    expected = stream(n_samples, 7, size, 1, consumed)
    ranks = [micro_batch_indices(n_samples, 7, consumed, size, micro, rank, dp_size) for rank in range(dp_size)]
    assert all(len(batches) == count and all(len(batch) == micro for batch in batches) for batches in ranks)
    actual = chain.from_iterable(ranks[rank][k] for k in range(count) for rank in range(dp_size))
    assert list(actual) == expected


def test_seeds_and_epochs_differ():
    """Other seed, other order; next epoch, other order; the order itself is pinned, for runs resumed elsewhere."""
    first, second = stream(20, 0, 20, 1), stream(20, 0, 20, 1, start=20)
    assert first != second
    assert first != stream(20, 1, 20, 1)
    assert stream(8, 1234, 8, 1) == [0, 1, 4, 6, 7, 5, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 0, 6, 4, 0, 1), "global_batch_size 6 is not a multiple of micro_batch_size 4 x data-parallel size 1"),
        ((10, 0, 0, 4, 2, 2, 2), r"dp_rank 2 is outside 0\.\.1"),
        ((0, 0, 0, 4, 2, 0, 2), "sizes must be positive: n_samples 0"),
        ((10, 0, -1, 4, 2, 0, 2), "consumed_samples -1"),
    ],
)
def test_errors(arguments, message):
    """Sizes that do not fit are refused with their values."""
    with pytest.raises(ValueError, match=message):
        micro_batch_indices(*arguments)
