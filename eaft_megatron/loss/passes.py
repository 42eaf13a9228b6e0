"""The two passes over the logits of some tokens: what a gate needs of them, and their gradient. Not differentiable.

The autograd functions of vocab_parallel.py (whole logits) and linear.py (logits made chunk by chunk) stand on these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from eaft_megatron.loss import torch_impl
from eaft_megatron.loss.gates import GateOutput
from eaft_megatron.loss.merge import Merged, merge_packed, merge_split, topk_entropy
from eaft_megatron.loss.message import Message
from eaft_megatron.loss.plan import Plan, outside_vocabulary
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.torch_impl import Spans, local_statistics, spans_of


class Seen(NamedTuple):
    """What the forward pass found, and what the backward pass needs of it.

    Attributes:
        stats: for the gate, one entry per token.
        maximum, sum_exp: ``[M]`` of the rows looked at, over the whole vocabulary; the second relative to the first.
        spans, keep: which rows were looked at, as runs and as ``[M]`` indices; None for all.
    """

    stats: TokenStats
    maximum: Tensor
    sum_exp: Tensor
    spans: Spans | None = None
    keep: Tensor | None = None


def look(rows: Tensor, target: Tensor, plan: Plan, *, entropy: bool, squares: bool) -> Seen:
    """The forward pass: one read of the logits and the exchange over ``plan.group``.

    Args:
        rows: ``[N, V_local]`` logits.
        target: ``[N]`` int64.
        plan: the checked arguments.
        entropy: whether the entropy is needed.
        squares: whether sum_p_squared is.
    """
    return begin_look(rows, target, plan, entropy=entropy, squares=squares)()


def begin_look(rows: Tensor, target: Tensor, plan: Plan, *, entropy: bool, squares: bool) -> Callable[[], Seen]:
    """:func:`look` with the logits read and the packed exchange on its way; what it returns does the rest.

    ``rows`` may be overwritten as soon as this returns.
    """
    return (_look_triton if plan.triton else _look_torch)(rows, target, plan, entropy, squares)


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
    spans: Spans | None = None,
) -> None:
    """The backward pass, ``upstream * slope * (softmax - onehot)``: one read, one write, no communication.

    Args:
        rows: ``[N, V_local]`` logits.
        target, maximum, sum_exp, slope, upstream: ``[M]``, for the rows looked at.
        plan: the checked arguments.
        out: ``[N, V_local]``; may be ``rows``. Rows of ignored tokens and rows not looked at get zeros.
        spans: as in :class:`Seen`.
    """
    if plan.triton:
        from eaft_megatron.loss import triton_impl

        triton_impl.write_gradient(rows, target, maximum, sum_exp, slope, upstream, plan.shard, out, plan.ignore_index)
        return
    # An ignored token's gradient is zero even where its upstream gradient is not a number.
    slope = (slope * upstream).masked_fill(target == plan.ignore_index, 0)
    torch_impl.write_gradient(rows, target, maximum, slope / sum_exp, slope, plan.shard, out, spans=spans)


def outputs_of(ctx, output: GateOutput, stats: TokenStats) -> tuple[Tensor | None, ...]:
    """What an autograd function of a loss returns: the loss, then the fields of TokenStats, without gradient."""
    extra = (stats.ce, stats.entropy, output.weight, stats.valid, stats.sum_p_squared)
    ctx.mark_non_differentiable(*(tensor for tensor in extra if tensor is not None))
    # A gate may return a tensor of the statistics as its loss; that one was just marked as having no gradient.
    loss = output.loss.clone() if any(output.loss is tensor for tensor in extra) else output.loss
    return loss, *extra


def _look_torch(rows: Tensor, target: Tensor, plan: Plan, entropy: bool, squares: bool) -> Callable[[], Seen]:
    """The forward pass in plain torch."""
    spans = keep = None
    if plan.compact:
        valid = target != plan.ignore_index
        spans, keep = spans_of(valid), valid.nonzero().squeeze(1)
    looked_at = target if keep is None else target[keep]
    k_local, k = (plan.k_local, plan.k) if entropy else (1, 1)  # the maximum is needed in any case
    local = local_statistics(rows, looked_at, plan.shard, k_local, spans=spans, sum_squares=squares)
    dtype = rows.dtype
    packed = plan.exchange == "packed"
    arrived = Message.of(local, k_local, dtype).send(plan.group) if packed else None

    def finish() -> Seen:
        if packed:
            merged = merge_packed(arrived(), k_local, k, local.dtype)
        else:
            owned = plan.shard.local_index(looked_at)[1]
            merged = merge_split(local, k_local, k, owned, plan.group, dtype=dtype)
        stats = _token_stats(merged, target, keep, plan, entropy)
        return Seen(stats, merged.topk[:, 0].clone(), merged.sum_exp, spans, keep)

    return finish


def _look_triton(rows: Tensor, target: Tensor, plan: Plan, entropy: bool, squares: bool) -> Callable[[], Seen]:
    """The forward pass by the kernels; with the split exchange they do the local part alone."""
    from eaft_megatron.loss import triton_impl

    k_local, k = (plan.k_local, plan.k) if entropy else (1, 1)
    ignored, dtype = plan.ignore_index, rows.dtype
    message = triton_impl.local_message(rows, target, plan.shard, k_local, ignore_index=ignored, sum_squares=squares)
    packed = plan.exchange == "packed"
    arrived = message.send(plan.group) if packed else None

    def finish() -> Seen:
        if not packed:
            owned = plan.shard.local_index(target)[1] & (target != ignored)
            merged = merge_split(message.statistics(), k_local, k, owned, plan.group, dtype=dtype)
            return Seen(_token_stats(merged, target, None, plan, entropy), merged.topk[:, 0].clone(), merged.sum_exp)
        found = triton_impl.merge_message(
            arrived(),
            target,
            k_local=k_local,
            k=k,
            vocab_size=plan.vocab_size,
            ignore_index=ignored,
            entropy=entropy,
        )
        stats = TokenStats(
            ce=found["ce"],
            entropy=found.get("entropy"),
            weight=None,
            valid=target != ignored,
            topk=plan.k,
            sum_p_squared=found.get("sum_p_squared"),
        )
        return Seen(stats, found["maximum"], found["sum_exp"])

    return finish


def _token_stats(merged: Merged, target: Tensor, keep: Tensor | None, plan: Plan, entropy: bool) -> TokenStats:
    """The whole vocabulary's numbers as the gate sees them: ``[N]``, zeros at ignored tokens.

    ``merged`` has a row for each token, or for those that ``keep`` names.
    """
    valid = target != plan.ignore_index
    looked_at = target if keep is None else target[keep]

    def spread(values: Tensor) -> Tensor:
        if keep is None:
            return values.masked_fill(~valid, 0)
        return values.new_zeros(target.shape).index_copy_(0, keep, values)

    ce = (merged.topk[:, 0] - merged.target_logit) + merged.sum_exp.log()
    ce = ce.masked_fill(outside_vocabulary(looked_at, plan.vocab_size, plan.ignore_index), float("nan"))
    squares = merged.sum_exp_squared
    return TokenStats(
        ce=spread(ce),
        entropy=spread(topk_entropy(merged.topk)) if entropy else None,
        weight=None,
        valid=valid,
        topk=plan.k,
        sum_p_squared=None if squares is None else spread(squares / merged.sum_exp.square()),
    )
