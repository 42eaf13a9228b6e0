"""``DotProductAttention``: rows of a batch, or packed sequences; whole, or cut for context parallelism."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.testing.te_standin import parallel
from eaft_megatron.testing.te_standin.base import Module
from eaft_megatron.testing.te_standin.packing import sequence_and_position, thd_get_partitioned_indices
from eaft_megatron.testing.te_standin.unsupported import refuse


class DotProductAttention(Module):
    """Attention as megatron-core asks Transformer Engine for it: its options, no dropout, no window, no fp8.

    As in the real one a causal mask type ignores ``attention_mask``: only packed sequences keep documents apart.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        for asked, what in (
            (attention_dropout, f"attention dropout {attention_dropout}"),
            (window_size not in (None, (-1, -1), (-1, 0)), f"a window of {window_size}"),
            (softmax_type != "vanilla" or return_max_logit, f"softmax_type {softmax_type}, return_max_logit"),
            (attention_type != "self", f"{attention_type} attention"),
            (not isinstance(kv_channels, int), f"queries and values of different widths {kv_channels}"),
        ):
            if asked:
                refuse(what)
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.set_tensor_parallel_group(tp_group)
        self.tp_size = tp_size if tp_group is None else parallel.group_size(tp_group)
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.head_dim = kv_channels
        self.num_gqa_groups_per_partition = (num_gqa_groups or num_attention_heads) // self.tp_size
        self.softmax_scale = 1.0 / math.sqrt(kv_channels) if softmax_scale is None else softmax_scale

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        """The group over which tokens are cut; how they would travel (``cp_comm_type``) changes no number."""
        if isinstance(cp_group, list):
            refuse("hierarchical context parallelism")
        self.cp_group, self.cp_global_ranks, self.cp_stream = cp_group, cp_global_ranks, cp_stream
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """``[s, b, h, d]`` ("sbhd") or ``[t, h, d]`` ("thd") to the same with heads and widths joined."""
        if core_attention_bias_type != "no_bias" or core_attention_bias is not None:
            refuse("attention with a bias")
        layers = query_layer, key_layer, value_layer
        mask_type, layout = attn_mask_type or self.attn_mask_type, qkv_format or self.qkv_format
        self._check(layers, layout)
        if layout == "thd":
            cu_seqlens = _bounds(mask_type, cu_seqlens_q, cu_seqlens_kv)
            max_seqlen = _longest(max_seqlen_q, max_seqlen_kv)
            out = self._packed(layers, mask_type, cu_seqlens, cu_seqlens_q_padded, max_seqlen)
        else:
            out = self._rows(layers, mask_type, attention_mask)
        return out.flatten(-2)

    def _check(self, layers: tuple[Tensor, Tensor, Tensor], layout: str) -> None:
        if layout not in ("sbhd", "thd"):
            refuse(f"qkv_format {layout}")
        if any(x.dim() != len(layout) for x in layers):
            raise ValueError(f"{layout} takes {len(layout)} dimensions, got {[tuple(x.shape) for x in layers]}")
        query, key, value = layers
        if not query.dtype == key.dtype == value.dtype or key.shape != value.shape:
            raise ValueError(f"queries, keys and values do not fit: {[(x.dtype, tuple(x.shape)) for x in layers]}")
        if key.shape[-2:] != (self.num_gqa_groups_per_partition, self.head_dim) or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"heads of {tuple(key.shape[-2:])}, expected {(self.num_gqa_groups_per_partition, self.head_dim)}"
            )

    def _gathered(self, layers: tuple[Tensor, Tensor, Tensor], cu_seqlens: Tensor) -> tuple[tuple, Tensor, Tensor]:
        """This rank's queries, all keys and values, and the token index of each query and key."""
        query, key, value = layers
        ranks = parallel.group_size(self.cp_group)
        if ranks == 1:
            at = torch.arange(query.shape[0])
            return layers, at, at
        held = [thd_get_partitioned_indices(cu_seqlens, query.shape[0] * ranks, ranks, rank) for rank in range(ranks)]
        key, value = (parallel.gather_from_ranks(x, self.cp_group) for x in (key, value))
        return (query, key, value), held[dist.get_rank(self.cp_group)].long(), torch.cat(held).long()

    def _rows(self, layers: tuple[Tensor, Tensor, Tensor], mask_type: str, attention_mask: Tensor | None) -> Tensor:
        """``[s / cp, b, h, d]``."""
        ranks = parallel.group_size(self.cp_group)
        boundaries = torch.tensor([0, layers[0].shape[0] * ranks], dtype=torch.int32)
        layers, query_at, key_at = self._gathered(layers, boundaries)
        if mask_type == "causal":
            hidden = key_at > query_at.unsqueeze(1)
        elif mask_type == "no_mask":
            hidden = None
        elif mask_type == "arbitrary" and ranks == 1:
            hidden = attention_mask
        else:
            refuse(f"attn_mask_type {mask_type} with sbhd and {ranks} context-parallel ranks")
        query, key, value = (x.permute(1, 2, 0, 3) for x in layers)
        return self._attend(query, key, value, hidden).permute(2, 0, 1, 3)

    def _packed(
        self,
        layers: tuple[Tensor, Tensor, Tensor],
        mask_type: str,
        cu_seqlens: Tensor,
        cu_seqlens_padded: Tensor | None,
        max_seqlen: int,
    ) -> Tensor:
        """``[t / cp, h, d]``; the room between a sequence's end and the next one's start gives 0."""
        bounds = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        if int((bounds[1:] - bounds[:-1]).max()) > max_seqlen:
            raise ValueError(f"max_seqlen {max_seqlen} is less than the longest sequence of {bounds.tolist()}")
        layers, query_at, key_at = self._gathered(layers, bounds)
        (query_row, query_place), (key_row, key_place) = (
            sequence_and_position(at, bounds) for at in (query_at, key_at)
        )
        query_real, key_real = query_place < lengths[query_row], key_place < lengths[key_row]
        hidden = (query_row.unsqueeze(1) != key_row) | ~key_real
        if "causal" in mask_type:
            hidden |= key_place > query_place.unsqueeze(1)
        hidden &= query_real.unsqueeze(1)  # a query that does not count must not divide by a sum of nothing
        query, key, value = (x.transpose(0, 1) for x in layers)
        out = self._attend(query, key, value, hidden).transpose(0, 1)
        return out * query_real[:, None, None]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        """``[..., h, s, d]``, softmax in float32 at least."""
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.softmax_scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.matmul(scores.softmax(-1).to(value.dtype), value)


def _bounds(mask_type: str, cu_seqlens_q: Tensor | None, cu_seqlens_kv: Tensor | None) -> Tensor:
    if "padding" not in mask_type:
        raise ValueError(f"thd takes attn_mask_type padding or padding_causal, got {mask_type}")
    for bounds in (cu_seqlens_q, cu_seqlens_kv):
        if bounds is None or bounds.dim() != 1 or bounds.dtype != torch.int32:
            raise ValueError("thd takes cu_seqlens_q and cu_seqlens_kv, int32 [sequences + 1]")
    assert cu_seqlens_q is not None and cu_seqlens_kv is not None
    if not torch.equal(cu_seqlens_q, cu_seqlens_kv):
        refuse("queries and keys packed differently")
    return cu_seqlens_q


def _longest(max_seqlen_q: Any, max_seqlen_kv: Any) -> int:
    if not isinstance(max_seqlen_q, int) or not isinstance(max_seqlen_kv, int):
        raise ValueError(f"thd takes max_seqlen_q and max_seqlen_kv as int, got {max_seqlen_q}, {max_seqlen_kv}")
    return max_seqlen_q
