"""The checked arguments that the passes over the logits follow; :mod:`eaft_megatron.loss.inputs` makes them."""

from __future__ import annotations

import dataclasses
import operator

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
    """``(rank, size)`` in the group; ``(0, 1)`` for None, which here means "not sharded" and not "the world".

    Raises:
        ValueError: a DeviceMesh or whatever else is no process group, or a group that this process is not in.
    """
    if group is None:
        return 0, 1
    outsider = group == dist.GroupMember.NON_GROUP_MEMBER
    if not outsider and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"a group must be a ProcessGroup or None (of a DeviceMesh: mesh.get_group()), got {group!r}")
    rank = -1 if outsider else dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group it was given: give every rank the group that it "
            "belongs to"
        )
    return rank, dist.get_world_size(group)


def checked_integer(name: str, value: int) -> int:
    """``value`` as an int; ``ValueError`` for 2.5, and for 2.0 as well."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
