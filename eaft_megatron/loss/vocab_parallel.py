"""The public losses on logits sharded over the vocabulary, and the autograd function under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.gates import EAFTGate, Gate
from eaft_megatron.loss.merge import Merged, merge_packed, merge_split, merge_topk, topk_entropy
from eaft_megatron.loss.plan import Plan, check_target, gate_context, make_plan, outside_vocabulary
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.torch_impl import Spans, local_statistics, local_topk, spans_of, write_gradient


def vocab_parallel_eaft_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    topk: int = 20,
    alpha: float = 1.0,
    entropy_norm: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
    exchange: str = "packed",
    validate: bool | None = None,
    compact_ignored: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Entropy-adaptive fine-tuning loss per token, ``(H_topK / entropy_norm) ** alpha * ce``, weight detached.

    The equation is that of arXiv 2601.02151, section 3; the K largest logits are those of the whole vocabulary, on
    however many ranks it lies. Reduce the result as you would reduce a cross entropy (never by the sum of weights).

    Args:
        vocab_parallel_logits: ``[..., V_local]`` bf16, fp16, fp32 or fp64: this rank's columns, the same number on
            every rank, rank r holding global ids ``r * V_local`` onwards.
        target: ``[...]`` int64 global ids, or ``ignore_index``; the same on every rank of ``group``.
        group: tensor-parallel process group. None means that the vocabulary is not sharded.
        topk: K of the entropy; ``min(topk, vocab_size)`` is used.
        alpha: exponent of the linear gate, >= 0.
        entropy_norm: nats; None for ``ln K`` (the paper); 3.0 for the authors' released code.
        vocab_size: true vocabulary; columns beyond it are padding and are never read. None: every column counts.
        ignore_index: target value of tokens that do not count: loss 0, gradient 0, whatever their logits hold.
        inplace_backward: let the backward pass write the gradient over the logits' storage. The logits are then
            lost; a second backward through them raises.
        impl: "triton" for the GPU kernels, "torch" for plain torch, "auto" for the kernels wherever they can run (see
            :func:`eaft_megatron.loss.implementation.choose_triton`). float64 logits are always plain torch's.
        exchange: "packed" (one all-gather of K + 2 numbers a token, the logits among them in their own dtype) or
            "split" (all-gather of the local top-K, then one all-reduce of [sum of exponentials, target logit]).
        validate: look for targets outside the vocabulary and raise. None: on the CPU only, for on a GPU looking
            stalls the stream; such a token's loss is then NaN.
        compact_ignored: leave the rows of ignored tokens out of every pass, so that they cost almost nothing. It has
            to know their number, which on a GPU is one host sync. None: on the CPU only. The kernels skip such rows
            without knowing their number, and ignore this argument.
        return_stats: also return detached :class:`TokenStats`.

    Returns:
        ``loss [...]``, float32 (float64 for float64 logits), or ``(loss, stats)``. NaN or +inf in a row's logits
        give a NaN loss. On every rank of ``group`` bitwise the same loss and weight (with "split": the same weight,
        and the same loss where the backend's all-reduce is deterministic).

    Raises:
        ValueError: wrong dtype or shape, topk < 1, vocab_size beyond what the shards hold, a bad option, or (see
            ``validate``) a target outside the vocabulary. Raised on every rank alike, before any collective.
    """
    return vocab_parallel_token_loss(
        vocab_parallel_logits,
        target,
        EAFTGate(alpha=alpha, entropy_norm=entropy_norm),
        group=group,
        topk=topk,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        impl=impl,
        exchange=exchange,
        validate=validate,
        compact_ignored=compact_ignored,
        return_stats=return_stats,
    )


def vocab_parallel_token_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    group: dist.ProcessGroup | None = None,
    side: Mapping[str, Tensor] | None = None,
    sequence_ids: Tensor | None = None,
    reduce_group: dist.ProcessGroup | None = None,
    topk: int = 20,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
    exchange: str = "packed",
    validate: bool | None = None,
    compact_ignored: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Per-token loss of any gate, see :mod:`eaft_megatron.loss.gates`.

    Args:
        gate: what to make of each token's statistics.
        side: extra columns for the gate, each shaped like ``target``: "ref_logprob", "sample_weight". Their values at
            ignored tokens do not matter.
        sequence_ids: int64, shaped like ``target``; tokens with equal ids belong to one sequence, anywhere in
            ``reduce_group`` (so data-parallel ranks must not reuse each other's).
        reduce_group: data x context parallel group for statistics of the batch (percentiles, TALR's median); None
            for this process alone. Every rank of it must hold the same number of tokens, and an error raised on one
            of its ranks leaves the others waiting: this is not the tensor-parallel group, whose ranks raise alike.

    The other arguments, the return value and the errors are those of :func:`vocab_parallel_eaft_loss`.
    """
    if not isinstance(gate, Gate):
        raise ValueError(f"gate must be a Gate such as EAFTGate(), got {type(gate).__name__}")
    plan = make_plan(vocab_parallel_logits, group, topk, vocab_size, impl, exchange)
    check_target(vocab_parallel_logits, target, plan.vocab_size, ignore_index, validate)
    gate.check(plan.k)
    plan = dataclasses.replace(
        plan,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        want_entropy=return_stats,
        compact=not plan.triton and (target.device.type == "cpu" if compact_ignored is None else compact_ignored),
        context=gate_context(gate, target, side or {}, sequence_ids, reduce_group),
    )
    columns = vocab_parallel_logits.shape[-1]
    rows = vocab_parallel_logits.reshape(-1, columns)
    loss, *stats = _TokenLoss.apply(rows, target.reshape(-1), gate, plan)
    loss = loss.reshape(target.shape)
    if not return_stats:
        return loss
    return loss, TokenStats(*stats[:4], topk=plan.k, sum_p_squared=stats[4]).reshape(target.shape)


@torch.no_grad()
def vocab_parallel_topk_entropy(
    vocab_parallel_logits: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    topk: int = 20,
    vocab_size: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Entropy, in nats, of the renormalised distribution over the K largest logits of the whole vocabulary.

    Read-only and without gradient, for stacks that must keep their own cross entropy. Call it *before* that: the
    cross entropies of Megatron and of older Transformer Engine overwrite the logits. One all-gather of K numbers a
    token.

    Args:
        vocab_parallel_logits: ``[..., V_local]``, as in :func:`vocab_parallel_eaft_loss`.
        group: tensor-parallel process group; None if the vocabulary is not sharded.
        topk: K; ``min(topk, vocab_size)`` is used.
        vocab_size: true vocabulary; None if no column is padding.
        impl: as in :func:`vocab_parallel_eaft_loss`.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), bitwise equal on every rank of ``group``.

    Raises:
        ValueError: wrong dtype, topk < 1, vocab_size beyond what the shards hold, or a bad impl.
    """
    plan = make_plan(vocab_parallel_logits, group, topk, vocab_size, impl, "packed")
    rows = vocab_parallel_logits.reshape(-1, vocab_parallel_logits.shape[-1])
    if plan.triton:
        from eaft_megatron.loss import triton_impl

        entropy = triton_impl.topk_entropy(rows, plan.shard, plan.k_local, plan.k, group)
    else:
        largest = merge_topk(local_topk(rows, plan.shard, plan.k_local), plan.k, group, dtype=rows.dtype)
        entropy = topk_entropy(largest)
    return entropy.reshape(vocab_parallel_logits.shape[:-1])


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


class _Seen(NamedTuple):
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


def _look_torch(rows: Tensor, target: Tensor, plan: Plan, entropy: bool, squares: bool) -> _Seen:
    """The forward pass in plain torch."""
    spans = keep = None
    if plan.compact:
        valid = target != plan.ignore_index
        spans, keep = spans_of(valid), valid.nonzero().squeeze(1)
    looked_at = target if keep is None else target[keep]
    k_local, k = (plan.k_local, plan.k) if entropy else (1, 1)  # the maximum is needed in any case
    local = local_statistics(rows, looked_at, plan.shard, k_local, spans=spans, sum_squares=squares)
    if plan.exchange == "packed":
        merged = merge_packed(local, k_local, k, plan.group, dtype=rows.dtype)
    else:
        owned = plan.shard.local_index(looked_at)[1]
        merged = merge_split(local, k_local, k, owned, plan.group, dtype=rows.dtype)
    stats = _token_stats(merged, target, keep, plan, entropy)
    return _Seen(stats, merged.topk[:, 0].clone(), merged.sum_exp, spans, keep)


def _look_triton(rows: Tensor, target: Tensor, plan: Plan, entropy: bool, squares: bool) -> _Seen:
    """The forward pass by the kernels; with the split exchange they do the local part alone."""
    from eaft_megatron.loss import triton_impl

    k_local, k = (plan.k_local, plan.k) if entropy else (1, 1)
    ignored = plan.ignore_index
    message = triton_impl.local_message(rows, target, plan.shard, k_local, ignore_index=ignored, sum_squares=squares)
    if plan.exchange == "split":
        owned = plan.shard.local_index(target)[1] & (target != ignored)
        merged = merge_split(message.statistics(), k_local, k, owned, plan.group, dtype=rows.dtype)
        return _Seen(_token_stats(merged, target, None, plan, entropy), merged.topk[:, 0].clone(), merged.sum_exp)
    found = triton_impl.merge_message(
        message,
        target,
        k_local=k_local,
        k=k,
        vocab_size=plan.vocab_size,
        ignore_index=ignored,
        entropy=entropy,
        group=plan.group,
    )
    stats = TokenStats(
        ce=found["ce"],
        entropy=found.get("entropy"),
        weight=None,
        valid=target != ignored,
        topk=plan.k,
        sum_p_squared=found.get("sum_p_squared"),
    )
    return _Seen(stats, found["maximum"], found["sum_exp"])


class _TokenLoss(torch.autograd.Function):
    """Forward: one read of the logits and the exchange. Backward: one read, one write, no communication."""

    @staticmethod
    def forward(ctx, rows: Tensor, target: Tensor, gate: Gate, plan: Plan):
        entropy = plan.want_entropy or "entropy" in gate.needs
        look = _look_triton if plan.triton else _look_torch
        stats, maximum, sum_exp, spans, keep = look(rows, target, plan, entropy, "sum_p_squared" in gate.needs)
        output = gate(stats, plan.context)
        looked_at, slope = (target, output.slope) if keep is None else (target[keep], output.slope[keep])
        ctx.save_for_backward(rows, looked_at, keep, maximum, sum_exp, slope)
        ctx.plan, ctx.spans = plan, spans
        extra = (stats.ce, stats.entropy, output.weight, stats.valid, stats.sum_p_squared)
        ctx.mark_non_differentiable(*(tensor for tensor in extra if tensor is not None))
        # A gate may return a tensor of the statistics as its loss; that one was just marked as having no gradient.
        loss = output.loss.clone() if any(output.loss is tensor for tensor in extra) else output.loss
        return loss, *extra

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        rows, target, keep, maximum, sum_exp, slope = ctx.saved_tensors
        plan = ctx.plan
        gradient = rows.detach() if plan.inplace_backward else torch.empty_like(rows)
        if plan.triton:
            from eaft_megatron.loss import triton_impl

            triton_impl.write_gradient(
                rows, target, maximum, sum_exp, slope, grad_loss, plan.shard, gradient, plan.ignore_index
            )
            return gradient, None, None, None
        # An ignored token's gradient is zero even where its upstream gradient is not a number.
        slope = slope * (grad_loss if keep is None else grad_loss[keep])
        slope = slope.masked_fill(target == plan.ignore_index, 0)
        write_gradient(rows, target, maximum, slope / sum_exp, slope, plan.shard, gradient, spans=ctx.spans)
        return gradient, None, None, None
