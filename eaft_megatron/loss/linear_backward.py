"""Where the linear loss's gradients go: to the hidden states over the tensor-parallel group, and to the weight.

Counts are those of one call of the loss; tp is the size of the tensor-parallel group, N the tokens, H the width of
the hidden states. With tp 1 nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.exchange import compute_dtype
from eaft_megatron.loss.plan import group_rank_and_size

_WEIGHT_ROWS = 1 << 14  # of the weight's gradient made at a time where its dtype is not that of the hidden states

# torch 2.13 renamed it and warns at every use of the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def scatter_sequence_sum(gradient: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's slice of the sum over the group: ``[S, ..., H]`` -> ``[S / tp, ..., H]``. One reduce-scatter."""
    _, size = group_rank_and_size(group)
    if size == 1:
        return gradient
    mine = gradient.new_empty((gradient.shape[0] // size, *gradient.shape[1:]))
    _reduce_scatter(mine, gradient.contiguous(), op=dist.ReduceOp.SUM, group=group)
    return mine


class PendingSums:
    """All-reduces that run while the next chunk is computed: one for each chunk, of its rows x H numbers."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group if group_rank_and_size(group)[1] > 1 else None
        self.handles: list[dist.Work] = []

    def add(self, gradient: Tensor) -> None:
        """Start summing a contiguous tensor over the group, in place."""
        if self.group is not None:
            self.handles.append(dist.all_reduce(gradient, op=dist.ReduceOp.SUM, group=self.group, async_op=True))

    def wait(self) -> None:
        """Until every sum is there."""
        for handle in self.handles:
            handle.wait()
        self.handles.clear()


class WeightGradient:
    """The gradient of the output layer's weight, ``[V_local, H]``, summed chunk by chunk.

    Args:
        weight: the parameter.
        main_grad: add into this tensor, whatever it holds, as Megatron's --gradient-accumulation-fusion does; None to
            return a gradient of the weight's own dtype.
        dtype: in which the sum is kept where there is no ``main_grad``; None for float32, float64 for a float64 weight.
    """

    def __init__(self, weight: Tensor, main_grad: Tensor | None, dtype: torch.dtype | None) -> None:
        self.weight, self.main_grad = weight, main_grad
        dtype = dtype or compute_dtype(weight.dtype)
        self.total = torch.zeros_like(weight, dtype=dtype) if main_grad is None else main_grad

    def add(self, logits_gradient: Tensor, hidden: Tensor) -> None:
        """Add ``[n, V_local]`` transposed times ``[n, H]``."""
        if self.total.dtype == hidden.dtype:
            self.total.addmm_(logits_gradient.t(), hidden)
            return
        for rows, columns in _blocks(self.total, logits_gradient):
            rows += columns.t() @ hidden

    def result(self) -> Tensor | None:
        """What autograd is to be given as the weight's gradient.

        With ``main_grad`` that is Megatron's protocol: a weight that carries ``grad_added_to_main_grad`` gets it set,
        and a gradient nobody reads, so that the hooks of its data-parallel wrapper run; zeros where
        ``zero_out_wgrad`` says that somebody adds to it (an embedding that shares the weight). Otherwise None.
        """
        if self.main_grad is None:
            return self.total.to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        dummy = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return dummy(self.weight)


def _blocks(total: Tensor, logits_gradient: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(total.split(_WEIGHT_ROWS), logits_gradient.split(_WEIGHT_ROWS, dim=1), strict=True)
