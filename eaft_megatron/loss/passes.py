"""The two passes over the logits of some tokens, and the gate between them. Nothing here is differentiable.

The autograd functions of vocab_parallel.py (whole logits) and linear.py (logits made chunk by chunk) stand on these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.loss import torch_impl
from eaft_megatron.loss.exchange import Statistics, merge_entropy, merge_packed, merge_split
from eaft_megatron.loss.inputs import BoundGate
from eaft_megatron.loss.plan import Plan
from eaft_megatron.loss.token_stats import TokenStats


def start_statistics(
    rows: Tensor, target: Tensor, plan: Plan, *, keep: Tensor | None = None
) -> Callable[[], Statistics]:
    """The forward pass: one read of the logits, and the exchange over ``plan.group`` on its way.

    Args:
        rows: ``[N, V_local]`` logits; they may be overwritten as soon as this returns.
        target: ``[M]`` int64, of the rows looked at.
        plan: the checked arguments.
        keep: ``[M]`` ascending indices of the rows to look at; None for all N. The kernels take None alone.

    Returns:
        A function that waits for the other ranks and gives the ``[M]`` statistics of the whole vocabulary.
    """
    merge = merge_packed
    if plan.triton:
        from eaft_megatron.loss import triton_impl

        message, merge = triton_impl.local_statistics(rows, target, plan), triton_impl.merge_packed
    else:
        message = torch_impl.local_statistics(rows, target, plan, keep=keep)
    if plan.exchange == "split":
        return lambda: merge_split(message, target, plan)
    gathered = message.start_gather(plan.group)
    return lambda: merge(gathered(), target, plan)


def compute_entropy(rows: Tensor, plan: Plan) -> Tensor:
    """``[N]``: the entropy alone, with the bits that :func:`start_statistics` gives it. One all-gather."""
    if plan.triton:
        from eaft_megatron.loss import triton_impl

        message = triton_impl.local_statistics(rows, None, plan)
        return triton_impl.merge_entropy(message.start_gather(plan.group)(), plan.k)
    return merge_entropy(torch_impl.local_topk(rows, plan).start_gather(plan.group)(), plan.k)


def apply_gate(
    ctx: Any, statistics: Statistics, target: Tensor, keep: Tensor | None, plan: Plan, gate: BoundGate
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """What the gate makes of the statistics of the rows looked at.

    Args:
        ctx: of the autograd function.
        statistics: ``[M]``.
        target: ``[N]``, of all tokens.
        keep: ``[M]`` indices of the rows looked at; None for all N.
        plan: the checked arguments.
        gate: see :data:`eaft_megatron.loss.inputs.BoundGate`.

    Returns:
        ``[M]`` slopes for the backward pass, and what the autograd function returns: the loss, then the tensors of
        TokenStats, without gradient.
    """
    stats = _token_stats(statistics, target, keep, plan)
    loss, slope, weight = gate(stats)
    extra = (stats.ce, stats.entropy, weight, stats.valid, stats.sum_p_squared)
    ctx.mark_non_differentiable(*(tensor for tensor in extra if tensor is not None))
    # A gate may return a tensor of the statistics as its loss; that one was just marked as having no gradient.
    if any(loss is tensor for tensor in extra):
        loss = loss.clone()
    return slope if keep is None else slope[keep], (loss, *extra)


def loss_and_stats(
    outputs: tuple[Tensor, ...], shape: tuple[int, ...], plan: Plan, return_stats: bool
) -> Tensor | tuple[Tensor, TokenStats]:
    """What a public loss returns, from what its autograd function did: tensors shaped like the target."""
    loss, ce, entropy, weight, valid, sum_p_squared = outputs
    loss = loss.reshape(shape)
    if not return_stats:
        return loss
    return loss, TokenStats(ce, entropy, weight, valid, plan.topk, sum_p_squared).reshape(shape)


def write_gradient(
    rows: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    slope: Tensor,
    upstream: Tensor,
    plan: Plan,
    out: Tensor,
    *,
    keep: Tensor | None = None,
) -> None:
    """The backward pass, ``upstream * slope * (softmax - onehot)``: one read, one write, no communication.

    Args:
        rows: ``[N, V_local]`` logits.
        target, maximum, sum_exp, slope, upstream: ``[M]``, for the rows looked at.
        plan: the checked arguments.
        out: ``[N, V_local]``; may be ``rows``. Rows of ignored tokens and rows not looked at get zeros.
        keep: as in :func:`start_statistics`.
    """
    if plan.triton:
        from eaft_megatron.loss import triton_impl

        triton_impl.write_gradient(rows, target, maximum, sum_exp, slope, upstream, plan, out)
        return
    # An ignored token's gradient is zero even where its upstream gradient is not a number.
    slope = (slope * upstream).masked_fill(plan.ignored(target), 0)
    torch_impl.write_gradient(rows, target, maximum, slope / sum_exp, slope, plan.shard, out, keep=keep)


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorator of an autograd function's backward: to differentiate what it returns is an error.

    Unlike torch's ``once_differentiable`` also where the upstream gradient requires none, as that of ``loss.sum()``.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # it is with create_graph=True
            return gradients
        return tuple(g if g is None else _NoSecondDerivative.apply(g.detach().requires_grad_()) for g in gradients)

    return guarded


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("this loss can be differentiated once: its gradient was computed without a graph")


def _token_stats(statistics: Statistics, target: Tensor, keep: Tensor | None, plan: Plan) -> TokenStats:
    """``[N]`` as the gate sees them: 0 at ignored tokens; at those that count and were not looked at, a NaN ``ce``."""
    valid = ~plan.ignored(target)

    def spread(values: Tensor | None, not_looked_at: float = 0.0) -> Tensor | None:
        if keep is None or values is None:
            return values
        return values.new_zeros(target.shape).masked_fill_(valid, not_looked_at).index_copy_(0, keep, values)

    ce = spread(statistics.ce, float("nan"))
    assert ce is not None
    return TokenStats(
        ce=ce,
        entropy=spread(statistics.entropy),
        weight=None,
        valid=valid,
        topk=plan.topk,
        sum_p_squared=spread(statistics.sum_p_squared),
    )
