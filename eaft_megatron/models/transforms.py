"""How one megatron-core parameter and the Hugging Face tensors behind it turn into each other.

A kind is stateless and works in both directions:

    to_megatron(tensors, tp_rank, tp_size, sizes) -> this tensor-parallel rank's parameter
    to_hf(shards, sizes) -> the Hugging Face tensors, given every rank's parameter in rank order

`tensors` may be torch tensors or safetensors slices: they are only ever indexed with ranges along the first two
dimensions, so a rank reads from disk what it keeps and nothing more. Needs torch alone.

partition: (dimension that is split over the tensor-parallel ranks, how many tensors lie one after the other on each
rank), what megatron-core calls partition_dim and partition_stride; None where every rank holds the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelSizes:
    """The widths that tensor shapes are made of. Field and property names double as the words of the weight tables."""

    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int  # true vocabulary: rows in the Hugging Face file
    padded_vocab: int  # rows in megatron, over all tensor-parallel ranks

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.kv_groups * self.head_dim

    @property
    def gate_up(self) -> int:
        """Rows of a gate and up projection that is one tensor."""
        return 2 * self.ffn

    @property
    def qkv_per_group(self) -> int:
        """Rows of one KV group in the fused projection: its query heads, one key head, one value head."""
        return self.query // self.kv_groups + 2 * self.head_dim


def _range(total: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    assert total % tp_size == 0, f"{total} rows or columns over {tp_size} tensor-parallel ranks"
    width = total // tp_size
    return tp_rank * width, (tp_rank + 1) * width


class Replicated:
    """The same tensor on every tensor-parallel rank: norms, biases added after a reduction."""

    partition = None

    def to_megatron(self, tensors: Sequence[Any], tp_rank: int, tp_size: int, sizes: ModelSizes) -> Tensor:
        return tensors[0][:]

    def to_hf(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [shards[0]]


class Row:
    """Input columns [out, in] split over the ranks (RowParallelLinear)."""

    partition = 1, 1

    def to_megatron(self, tensors: Sequence[Any], tp_rank: int, tp_size: int, sizes: ModelSizes) -> Tensor:
        start, end = _range(_shape(tensors[0])[1], tp_rank, tp_size)
        return tensors[0][:, start:end]

    def to_hf(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [torch.cat(list(shards), dim=1)]


class QKV:
    """q, k, v (weights [rows, hidden] or biases [rows]) fused as megatron wants them: group by group, q q .. k v.

    With more ranks than KV groups a rank holds a part of one group, wherever the even split of the rows falls
    (megatron.core.transformer.attention gathers the whole group again after the projection).
    """

    partition = 0, 1

    def to_megatron(self, tensors: Sequence[Any], tp_rank: int, tp_size: int, sizes: ModelSizes) -> Tensor:
        per_group = sizes.qkv_per_group
        start, end = _range(sizes.kv_groups * per_group, tp_rank, tp_size)
        first, last = start // per_group, -(-end // per_group)  # the KV groups this rank's rows touch
        parts = []
        for tensor in tensors:
            rows = _rows(tensor) // sizes.kv_groups
            part = tensor[first * rows : last * rows]
            parts.append(part.reshape(last - first, rows, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)[start - first * per_group : end - first * per_group]

    def to_hf(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        fused = torch.cat(list(shards))
        fused = fused.reshape(sizes.kv_groups, sizes.qkv_per_group, *fused.shape[1:])
        rows = [sizes.query // sizes.kv_groups, sizes.head_dim, sizes.head_dim]
        return [part.flatten(0, 1) for part in fused.split(rows, dim=1)]


class GateUp:
    """gate and up [ffn, hidden] of a gated MLP: each rank holds its slice of gate, then its slice of up."""

    partition = 0, 2

    def to_megatron(self, tensors: Sequence[Any], tp_rank: int, tp_size: int, sizes: ModelSizes) -> Tensor:
        start, end = _range(sizes.ffn, tp_rank, tp_size)
        return torch.cat([tensor[start:end] for tensor in tensors])

    def to_hf(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])]


class FusedGateUp:
    """The same parameter as GateUp, from one tensor [2 ffn, hidden]: all of gate, then all of up."""

    partition = 0, 2

    def to_megatron(self, tensors: Sequence[Any], tp_rank: int, tp_size: int, sizes: ModelSizes) -> Tensor:
        start, end = _range(sizes.ffn, tp_rank, tp_size)
        return torch.cat([tensors[0][start:end], tensors[0][sizes.ffn + start : sizes.ffn + end]])

    def to_hf(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [torch.cat(GATE_UP.to_hf(shards, sizes))]


class Vocab:
    """Vocabulary rows [vocab, hidden] split over the ranks, padded with zero rows to sizes.padded_vocab."""

    partition = 0, 1

    def to_megatron(self, tensors: Sequence[Any], tp_rank: int, tp_size: int, sizes: ModelSizes) -> Tensor:
        start, end = _range(sizes.padded_vocab, tp_rank, tp_size)
        # At least one row is read, also where this rank holds padding only: it brings dtype and width.
        first = min(start, sizes.vocab - 1)
        rows = tensors[0][first : max(min(end, sizes.vocab), first + 1)]
        if start + len(rows) == end and first == start:
            return rows
        padded = rows.new_zeros(end - start, *rows.shape[1:])
        if start < sizes.vocab:
            padded[: len(rows)] = rows
        return padded

    def to_hf(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [torch.cat(list(shards))[: sizes.vocab]]


def _shape(tensor: Any) -> list[int]:
    """Shape of a torch tensor or of a safetensors slice."""
    return list(tensor.shape) if isinstance(tensor, Tensor) else tensor.get_shape()


def _rows(tensor: Any) -> int:
    return _shape(tensor)[0]


REPLICATED, ROW, QKV_ROWS, VOCAB = Replicated(), Row(), QKV(), Vocab()
GATE_UP, FUSED_GATE_UP = GateUp(), FusedGateUp()
