"""Where the losses talk to other ranks (hidden_states.py: the output layer's own). Docstrings count calls and bytes.

N is the number of tokens and tp the size of the tensor-parallel group. A logit takes the 2, 4 or 8 bytes of the
logits' own dtype, a sum 4 (8 for float64 logits). In the backward pass only linear.py's gather comes here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it and warns at every use of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def group_rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """``(rank, size)`` in the group; ``(0, 1)`` for None, which here means "not sharded" and not "the world"."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather_rows(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's rows, in rank order: ``[N, ...]`` -> ``[tp, N, ...]``.

    One all-gather; each rank sends its tensor and receives tp times that. The packed exchange sends one
    :class:`eaft_megatron.loss.message.Message`: per token K + 1 logits (the largest, the target's) and one sum of
    exponentials, 46 bytes for bf16 logits and K = 20, 88 for fp32. The split exchange sends the K largest alone.
    """
    return start_all_gather_rows(local, group)()


def start_all_gather_rows(local: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """:func:`all_gather_rows` on its way while something else is computed: what it returns waits and has the rows."""
    _, size = group_rank_and_size(group)
    if size == 1:
        return lambda: local.unsqueeze(0)
    local = local.contiguous()
    gathered = local.new_empty((size * local.shape[0], *local.shape[1:]))
    handle = _all_gather(gathered, local, group=group, async_op=True)

    def arrived() -> Tensor:
        handle.wait()
        return gathered.view(size, *local.shape)

    return arrived


def all_reduce_sum(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks of the group, in place: one all-reduce of the tensor's own size.

    In the split exchange the tensor is ``[2, N]``: the sum of exponentials and the target's logit. The result is
    the same on every rank only where the backend's all-reduce is deterministic.
    """
    _, size = group_rank_and_size(group)
    if size > 1:
        dist.all_reduce(local, op=dist.ReduceOp.SUM, group=group)
    return local
