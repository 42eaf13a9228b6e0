"""Which positions of a sample a context-parallel rank holds: for the columns that Megatron does not know of."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def context_parallel_indices(
    seq_length: int, cp_size: int, cp_rank: int, cu_seqlens: Sequence[int] | None = None
) -> torch.Tensor:
    """``[seq_length / cp_size]`` int64: the positions of ``cp_rank``, in its order.

    A sequence is cut into 2 x cp_size equal pieces, and rank r holds the pieces r and 2 x cp_size - 1 - r, so that
    causal attention costs every rank the same (``get_batch_on_this_cp_rank`` in megatron-core). Packed sequences are
    cut one by one (Transformer Engine's ``thd_get_partitioned_indices``).

    Args:
        seq_length: positions of the whole sample.
        cp_size, cp_rank: of the context-parallel group.
        cu_seqlens: boundaries of the packed sequences, from 0 to seq_length; None: one sequence.

    Raises:
        ValueError: a sequence whose length is no multiple of 2 x cp_size.
    """
    if cp_size == 1:
        return torch.arange(seq_length)
    bounds = [0, seq_length] if cu_seqlens is None else [int(bound) for bound in cu_seqlens]
    parts = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        piece, rest = divmod(end - begin, 2 * cp_size)
        if rest:
            raise ValueError(
                f"a sequence of {end - begin} positions cannot be cut into 2 x {cp_size} equal pieces for context "
                f"parallelism: prepare the data with --pad-to-multiple-of {2 * cp_size}"
            )
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(torch.arange(begin + number * piece, begin + (number + 1) * piece))
    return torch.cat(parts)
