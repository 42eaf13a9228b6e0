"""Which samples make up an iteration, and samples as a batch. No state: the order follows from the arguments alone."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def epoch_order(n_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of range(n_samples), int64, that depends on (seed, epoch) only."""
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # the CPU generator keeps 32 bits
    return torch.randperm(n_samples, generator=generator)


@functools.lru_cache(maxsize=4)
def _order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(n_samples, seed, epoch).numpy()


def micro_batch_indices(
    n_samples: int,
    seed: int,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[list[int]]:
    """Sample indices of the micro-batches of one iteration on one data-parallel rank.

    The samples form one endless row, epoch after epoch, each epoch in its own order; the iteration takes the
    `global_batch_size` samples from position `consumed_samples` on. Micro-batch k of rank r takes the r-th group of
    `micro_batch_size` in the k-th stretch, as Megatron's own sampler does. An iteration may straddle two epochs;
    nothing is skipped or repeated within an epoch.

    Raises:
        ValueError: sizes that are not positive, a rank outside dp_size, or a global batch that is not a multiple of
            micro_batch_size x dp_size.
    """
    stretch = micro_batch_size * dp_size
    if min(n_samples, global_batch_size, micro_batch_size, dp_size) < 1 or consumed_samples < 0:
        raise ValueError(
            f"sizes must be positive: n_samples {n_samples}, global_batch_size {global_batch_size}, micro_batch_size "
            f"{micro_batch_size}, dp_size {dp_size}, consumed_samples {consumed_samples} (may be 0)"
        )
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is outside 0..{dp_size - 1}")
    if global_batch_size % stretch:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"data-parallel size {dp_size}"
        )
    first_epoch = consumed_samples // n_samples
    last_epoch = (consumed_samples + global_batch_size - 1) // n_samples
    orders = {epoch: _order(n_samples, seed, epoch) for epoch in range(first_epoch, last_epoch + 1)}
    starts = range(consumed_samples + dp_rank * micro_batch_size, consumed_samples + global_batch_size, stretch)
    return [
        [
            int(orders[position // n_samples][position % n_samples])
            for position in range(start, start + micro_batch_size)
        ]
        for start in starts
    ]


def collate(samples: Sequence[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Stack samples [s] to [b, s], or to [b, length] with the right end, which must be padding, cut off.

    Raises:
        ValueError: no samples, a length outside 1..s, or one that would cut off a token with a loss.
    """
    if not samples:
        raise ValueError("collate needs at least one sample")
    size = samples[0]["tokens"].numel()
    length = size if length is None else length
    if not 1 <= length <= size:
        raise ValueError(f"length {length} is outside 1..{size}")
    if any(sample["loss_mask"][length:].any() for sample in samples):
        raise ValueError(f"length {length} cuts off tokens that are trained on")
    return {key: torch.stack([sample[key][:length] for sample in samples]) for key in samples[0]}
