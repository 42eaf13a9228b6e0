"""Where tokens stand: packed sequences, and the pieces of them that a context-parallel rank holds."""

from __future__ import annotations

import torch
from torch import Tensor


def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """``[total_tokens / world_size]`` int32: which tokens of a packed micro-batch context-parallel rank ``rank`` has.

    Every sequence is cut into ``2 * world_size`` equal pieces; a rank has the ``rank``-th from the front and the
    ``rank``-th from the back, so that causal attention costs every rank the same ("zigzag").

    Args:
        cu_seqlens: ``[sequences + 1]`` int32, ascending from 0 to ``total_tokens``.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be int32 [sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total_tokens:
        raise ValueError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}, not from 0 to {total_tokens}")
    held = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        if (end - begin) % (2 * world_size):
            raise ValueError(f"a sequence of {end - begin} tokens does not cut into {2 * world_size} equal pieces")
        pieces = torch.arange(begin, end, dtype=torch.int32).chunk(2 * world_size)
        held += [pieces[rank], pieces[-1 - rank]] if end > begin else []
    return torch.cat(held)


def sequence_and_position(at: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """For each token index in ``at`` the sequence it belongs to, and its position there."""
    bounds = cu_seqlens.long()
    sequence = torch.bucketize(at.long(), bounds[1:], right=True).clamp(max=len(bounds) - 2)
    return sequence, at.long() - bounds[sequence]
