"""Collectives with gradients, along the first dimension; with one rank, or no group, each is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_Collective = Callable[[Tensor, Any], Tensor]


def group_size(group: Any) -> int:
    """Ranks of ``group``; None, or no torch.distributed at all, is one."""
    return 1 if group is None or not dist.is_initialized() else dist.get_world_size(group)


def _joined(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _summed_part(x: Tensor, group: Any) -> Tensor:
    return _summed(x, group).chunk(group_size(group))[dist.get_rank(group)].contiguous()


class _WithGradient(torch.autograd.Function):
    """A collective forward, another one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, forward: _Collective, backward: _Collective) -> Tensor:
        ctx.group, ctx.collective = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.collective(grad, ctx.group), None, None, None


def _differentiable(forward: _Collective, backward: _Collective) -> _Collective:
    def collective(x: Tensor, group: Any) -> Tensor:
        return x if group_size(group) == 1 else _WithGradient.apply(x, group, forward, backward)

    return collective


copy_to_ranks = _differentiable(lambda x, group: x.view_as(x), _summed)
"""The same input on every rank; gradients are summed."""
sum_over_ranks = _differentiable(_summed, lambda grad, group: grad)
"""Partial results to their sum, the same on every rank."""
gather_from_ranks = _differentiable(_joined, _summed_part)
"""``[n, ...]`` to ``[ranks * n, ...]``; each rank gets the summed gradient of its part."""
reduce_scatter = _differentiable(_summed_part, _joined)
"""Partial results ``[ranks * n, ...]`` to this rank's part ``[n, ...]`` of the sum."""
