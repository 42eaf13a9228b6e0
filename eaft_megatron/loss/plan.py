"""The checked arguments that the passes over the logits follow; :mod:`eaft_megatron.loss.inputs` makes them."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which columns of the true vocabulary this rank holds: ``start`` to ``start + width`` in global ids."""

    start: int
    width: int

    @classmethod
    def of(cls, rank: int, columns: int, vocab_size: int) -> Shard:
        """The shard of ``rank`` when every rank holds ``columns`` columns, those beyond ``vocab_size`` padding."""
        start = rank * columns
        return cls(start, min(max(vocab_size - start, 0), columns))

    def local_index(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """``(index, owned)``: the target's column here (0 where it is not here), and whether it is."""
        index = target - self.start
        owned = (index >= 0) & (index < self.width)
        return index.masked_fill(~owned, 0), owned


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compute, of which columns, with whom.

    Attributes:
        group: tensor-parallel process group; None if the vocabulary is not sharded.
        shard: the columns held here.
        vocab_size: the true one.
        k: largest logits of the whole vocabulary that are looked for; 1, the maximum, where no entropy is needed.
        k_local: how many of them each rank contributes.
        topk: the K in force, ``min(topk, vocab_size)``, whether an entropy is needed or not.
        exchange: "packed" or "split".
        triton: whether the kernels run, or plain torch.
        ignore_index: target of tokens that do not count.
        entropy: whether the entropy is needed.
        sum_squares: whether the sum of squared probabilities is.
    """

    group: dist.ProcessGroup | None
    shard: Shard
    vocab_size: int
    k: int
    k_local: int
    topk: int
    exchange: str
    triton: bool
    ignore_index: int
    entropy: bool
    sum_squares: bool

    def ignored(self, target: Tensor) -> Tensor:
        """Bool, shaped like ``target``."""
        return target == self.ignore_index

    def outside_vocabulary(self, target: Tensor) -> Tensor:
        """Bool, shaped like ``target``: neither ignored nor an id of the true vocabulary."""
        return ~self.ignored(target) & ((target < 0) | (target >= self.vocab_size))


def group_rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """``(rank, size)`` in the group; ``(0, 1)`` for None, which here means "not sharded" and not "the world"."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)
