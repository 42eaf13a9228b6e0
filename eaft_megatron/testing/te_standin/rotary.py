"""The fused rotary embedding's interface, and the split that comes before it."""

from __future__ import annotations

import torch
from torch import Tensor

from eaft_megatron.testing.te_standin.packing import sequence_and_position, thd_get_partitioned_indices
from eaft_megatron.testing.te_standin.unsupported import refuse


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotate the first ``freqs.shape[-1]`` of each head's dimensions, in float32 at least.

    Args:
        t: ``[s, b, h, d]``, or packed ("thd") ``[t / cp_size, h, d]``: this context-parallel rank's pieces.
        freqs: ``[s or more, 1, 1, rotated]`` angles; under "thd" each sequence starts with the first of them.
        interleaved: pairs are neighbours instead of the two halves.
    """
    if start_positions is not None or tensor_format not in ("sbhd", "thd"):
        refuse(f"rotary embeddings of {tensor_format} with start_positions={start_positions}")
    if tensor_format == "thd":
        if cu_seqlens is None:
            raise ValueError("rotary embeddings of packed sequences need cu_seqlens")
        total = t.shape[0] * cp_size
        at = thd_get_partitioned_indices(cu_seqlens, total, cp_size, cp_rank) if cp_size > 1 else torch.arange(total)
        angles = freqs[sequence_and_position(at, cu_seqlens)[1]].squeeze(1)
    else:
        angles = freqs[: t.shape[0]]
    width = angles.shape[-1]
    rotated, rest = t[..., :width].to(torch.promote_types(t.dtype, torch.float32)), t[..., width:]
    result = rotated * angles.cos() + _quarter_turn(rotated, interleaved) * angles.sin()
    return torch.cat((result.to(t.dtype), rest), dim=-1)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class split_along_dim:  # noqa: N801 - stands for an autograd function, used by its `apply`
    """``_SplitAlongDim``."""

    @staticmethod
    def apply(tensor: Tensor, dim: int, sizes: list[int], squeeze: bool = False) -> tuple[Tensor, ...]:
        parts = torch.split(tensor, sizes, dim)
        return tuple(part.squeeze(dim) for part in parts) if squeeze else parts
