"""The public losses on logits sharded over the vocabulary, and the autograd function under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.collectives import group_rank_and_size
from eaft_megatron.loss.gates import EAFTGate, Gate, GateContext
from eaft_megatron.loss.merge import Merged, merge_packed, merge_split, merge_topk, topk_entropy
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.torch_impl import Shard, local_statistics, local_topk, spans_of, write_gradient

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        impl: "auto" or "torch".
        exchange: "packed" (one all-gather of K + 2 numbers a token) or "split" (all-gather of the local top-K, then
            one all-reduce of [sum of exponentials, target logit]).
        validate: look for targets outside the vocabulary and raise. None: on the CPU only, for on a GPU looking
            stalls the stream; such a token's loss is then NaN.
        compact_ignored: leave the rows of ignored tokens out of every pass, so that they cost almost nothing. It has
            to know their number, which on a GPU is one host sync. None: on the CPU only.
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
    plan = _plan(vocab_parallel_logits, group, topk, vocab_size, impl, exchange)
    _check_target(vocab_parallel_logits, target, plan.vocab_size, ignore_index, validate)
    gate.check(plan.k)
    plan = dataclasses.replace(
        plan,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        want_entropy=return_stats,
        compact=target.device.type == "cpu" if compact_ignored is None else compact_ignored,
        context=_context(gate, target, side or {}, sequence_ids, reduce_group),
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

    Returns:
        ``[...]`` float32 (float64 for float64 logits), bitwise equal on every rank of ``group``.

    Raises:
        ValueError: wrong dtype, topk < 1, or vocab_size beyond what the shards hold.
    """
    plan = _plan(vocab_parallel_logits, group, topk, vocab_size, "auto", "packed")
    rows = vocab_parallel_logits.reshape(-1, vocab_parallel_logits.shape[-1])
    largest = merge_topk(local_topk(rows, plan.shard, plan.k_local), plan.k, group)
    return topk_entropy(largest).reshape(vocab_parallel_logits.shape[:-1])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The checked arguments, and what follows from them."""

    group: dist.ProcessGroup | None
    shard: Shard
    vocab_size: int
    k: int  # over the whole vocabulary
    k_local: int  # what each rank contributes
    exchange: str
    ignore_index: int = -100
    inplace_backward: bool = False
    want_entropy: bool = False
    compact: bool = False
    context: GateContext = dataclasses.field(default_factory=GateContext)


def _plan(logits: Tensor, group, topk: int, vocab_size: int | None, impl: str, exchange: str) -> _Plan:
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be bfloat16, float16, float32 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., V_local] with V_local >= 1, got shape {tuple(logits.shape)}")
    if topk < 1:
        raise ValueError(f"topk (--eaft-topk) must be >= 1, got {topk}")
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto' or 'torch' (this release has no other), got {impl!r}")
    if exchange not in ("packed", "split"):
        raise ValueError(f"exchange must be 'packed' or 'split', got {exchange!r}")
    rank, size = group_rank_and_size(group)
    columns = logits.shape[-1]
    if vocab_size is None:
        vocab_size = columns * size
    if not 1 <= vocab_size <= columns * size:
        raise ValueError(
            f"vocab_size (--true-vocab-size) must lie in [1, {columns * size}], what {size} shard(s) of {columns} "
            f"columns hold, got {vocab_size}"
        )
    k = min(topk, vocab_size)
    return _Plan(group, Shard.of(rank, columns, vocab_size), vocab_size, k, min(k, columns), exchange)


def _check_target(logits: Tensor, target: Tensor, vocab_size: int, ignore_index: int, validate: bool | None) -> None:
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have the logits' shape without the last dimension: logits {tuple(logits.shape)}, "
            f"target {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, target on {target.device}")
    if validate or (validate is None and target.device.type == "cpu"):
        outside = _outside(target, vocab_size, ignore_index)
        if bool(outside.any()):
            where = outside.nonzero()[0].tolist()
            raise ValueError(
                f"target[{', '.join(map(str, where))}] = {int(target[outside][0])} is outside the vocabulary of "
                f"{vocab_size} (and is not ignore_index {ignore_index}); {int(outside.sum())} such target(s) of "
                f"shape {tuple(target.shape)}"
            )


def _context(gate: Gate, target: Tensor, side: Mapping[str, Tensor], sequence_ids, reduce_group) -> GateContext:
    """The gate's extra inputs, checked against the target's shape and flattened."""
    columns = dict(side)
    if sequence_ids is not None:
        if sequence_ids.dtype != torch.int64:
            raise ValueError(f"sequence_ids must be int64, got {sequence_ids.dtype}")
        columns["sequence_ids"] = sequence_ids
    elif gate.needs_sequence_ids:
        raise ValueError(f"{type(gate).__name__} needs sequence_ids, an int64 tensor shaped like target")
    for name in gate.needs_side:
        if name not in columns:
            raise ValueError(f"{type(gate).__name__} needs the side column {name!r}, a tensor shaped like target")
    for name, column in columns.items():
        if column.shape != target.shape:
            raise ValueError(f"{name} must be shaped like target {tuple(target.shape)}, got {tuple(column.shape)}")
    flat = {name: column.detach().reshape(-1) for name, column in columns.items()}
    return GateContext(flat, flat.pop("sequence_ids", None), reduce_group)


def _outside(target: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return (target != ignore_index) & ((target < 0) | (target >= vocab_size))


def _token_stats(merged: Merged, target: Tensor, keep: Tensor | None, plan: _Plan, entropy: bool) -> TokenStats:
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
    ce = ce.masked_fill(_outside(looked_at, plan.vocab_size, plan.ignore_index), float("nan"))
    squares = merged.sum_exp_squared
    return TokenStats(
        ce=spread(ce),
        entropy=spread(topk_entropy(merged.topk)) if entropy else None,
        weight=None,
        valid=valid,
        topk=plan.k,
        sum_p_squared=None if squares is None else spread(squares / merged.sum_exp.square()),
    )


class _TokenLoss(torch.autograd.Function):
    """Forward: one read of the logits and the exchange. Backward: one read, one write, no communication."""

    @staticmethod
    def forward(ctx, rows: Tensor, target: Tensor, gate: Gate, plan: _Plan):
        spans = keep = None
        if plan.compact:
            valid = target != plan.ignore_index
            spans, keep = spans_of(valid), valid.nonzero().squeeze(1)
        looked_at = target if keep is None else target[keep]
        entropy = plan.want_entropy or "entropy" in gate.needs
        k_local, k = (plan.k_local, plan.k) if entropy else (1, 1)  # the maximum is needed in any case
        squares = "sum_p_squared" in gate.needs
        local = local_statistics(rows, looked_at, plan.shard, k_local, spans=spans, sum_squares=squares)
        if plan.exchange == "packed":
            merged = merge_packed(local, k_local, k, plan.group)
        else:
            merged = merge_split(local, k_local, k, plan.shard.local_index(looked_at)[1], plan.group)
        stats = _token_stats(merged, target, keep, plan, entropy)
        output = gate(stats, plan.context)
        slope = output.slope if keep is None else output.slope[keep]
        ctx.save_for_backward(rows, looked_at, keep, merged.topk[:, 0].clone(), merged.sum_exp, slope)
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
        # An ignored token's gradient is zero even where its upstream gradient is not a number.
        slope = slope * (grad_loss if keep is None else grad_loss[keep])
        slope = slope.masked_fill(target == plan.ignore_index, 0)
        gradient = rows.detach() if plan.inplace_backward else torch.empty_like(rows)
        write_gradient(rows, target, maximum, slope / sum_exp, slope, plan.shard, gradient, spans=ctx.spans)
        return gradient, None, None, None
