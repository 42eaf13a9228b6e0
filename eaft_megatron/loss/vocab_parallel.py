"""The public losses on logits sharded over the vocabulary, and the autograd function under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.gate import Gate
from eaft_megatron.loss.gates import EAFTGate
from eaft_megatron.loss.inputs import BoundGate, check_loss_inputs, make_plan
from eaft_megatron.loss.options import EAFTLogitsOptions, LogitsOptions, LossOptions, refuse_options_of_other_gates
from eaft_megatron.loss.passes import (
    apply_gate,
    compute_entropy,
    differentiable_once,
    loss_and_stats,
    start_statistics,
    write_gradient,
)
from eaft_megatron.loss.plan import Plan
from eaft_megatron.loss.token_stats import TokenStats

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


@overload
def vocab_parallel_eaft_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[EAFTLogitsOptions],
) -> Tensor: ...


@overload
def vocab_parallel_eaft_loss(
    vocab_parallel_logits: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[EAFTLogitsOptions]
) -> tuple[Tensor, TokenStats]: ...


@overload
def vocab_parallel_eaft_loss(
    vocab_parallel_logits: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[EAFTLogitsOptions]
) -> Tensor | tuple[Tensor, TokenStats]: ...


def vocab_parallel_eaft_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    entropy_norm: float | None = None,
    return_stats: bool = False,
    **options: Unpack[LogitsOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """Entropy-adaptive fine-tuning loss per token, ``(H_topK / entropy_norm) ** alpha * ce``, weight detached.

    The equation is that of arXiv 2601.02151, section 3; the K largest logits are those of the whole vocabulary, on
    however many ranks it lies. Reduce the result as you would reduce a cross entropy (never by the sum of weights).

    Args:
        vocab_parallel_logits: ``[..., V_local]`` bf16, fp16, fp32 or fp64: this rank's columns, the same number on
            every rank, rank r holding global ids ``r * V_local`` onwards.
        target: ``[...]`` int64 global ids, or ``ignore_index``; the same on every rank of ``group``.
        group: tensor-parallel process group. None (default) means that the vocabulary is not sharded.
        topk: K of the entropy, 20; ``min(topk, vocab_size)`` is used.
        alpha: exponent of the linear gate, >= 0.
        entropy_norm: nats; None for ``ln K`` (the paper); 3.0 for the authors' released code.
        vocab_size: true vocabulary; columns beyond it are padding and never read. None (default): every column counts.
        ignore_index: target value of tokens that do not count, -100: loss 0, gradient 0, whatever their logits hold.
        inplace_backward: let the backward pass write the gradient over the logits' storage. The logits are then
            lost; a second backward, or that of another use of them, raises. Logits that share memory among
            themselves (``expand``) are left alone.
        impl: "auto" (default) for the GPU kernels wherever they can run, "triton" or "torch" for one of the two (see
            :func:`eaft_megatron.loss.implementation.choose_triton`). float64 logits are always plain torch's.
        exchange: "packed" (default: one all-gather of K + 2 numbers a token, the logits among them in their own
            dtype) or "split" (all-gather of the local top-K, then one all-reduce of [sum of exponentials, target
            logit]).
        validate: look for targets outside the vocabulary and raise. None (default): on the CPU only, for on a GPU
            looking stalls the stream; such a token's loss is then NaN.
        compact_ignored: leave the rows of ignored tokens out of every pass, so that they cost almost nothing. It has
            to know their number, which on a GPU is one host sync. None (default): on the CPU only. The kernels skip
            such rows without knowing their number, and ignore this argument.
        return_stats: also return detached :class:`TokenStats`.

    Returns:
        ``loss [...]``, float32 (float64 for float64 logits), or ``(loss, stats)``. NaN or +inf in a row's logits
        give a NaN loss. On every rank of ``group`` bitwise the same loss and weight (with "split": the same weight,
        and the same loss where the backend's all-reduce is deterministic).

    Raises:
        ValueError: wrong dtype or shape, topk < 1, vocab_size beyond what the shards hold, a bad option, or (see
            ``validate``) a target outside the vocabulary. Raised on every rank alike, before any collective.
    """
    refuse_options_of_other_gates("vocab_parallel_eaft_loss", options)
    gate = EAFTGate(alpha=alpha, entropy_norm=entropy_norm)
    return vocab_parallel_token_loss(vocab_parallel_logits, target, gate, return_stats=return_stats, **options)


@overload
def vocab_parallel_token_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...


@overload
def vocab_parallel_token_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: Literal[True],
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor, TokenStats]: ...


@overload
def vocab_parallel_token_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: bool,
    **options: Unpack[LogitsOptions],
) -> Tensor | tuple[Tensor, TokenStats]: ...


def vocab_parallel_token_loss(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    inplace_backward: bool = False,
    compact_ignored: bool | None = None,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
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
    plan, bound_gate = check_loss_inputs(vocab_parallel_logits, target, gate, return_stats=return_stats, **options)
    if compact_ignored is None:
        compact_ignored = target.device.type == "cpu"
    rows = vocab_parallel_logits.reshape(-1, vocab_parallel_logits.shape[-1])
    compact = compact_ignored and not plan.triton
    outputs = _TokenLoss.apply(rows, target.reshape(-1), plan, bound_gate, compact, inplace_backward)
    return loss_and_stats(outputs, target.shape, plan, return_stats)


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
    plan = make_plan(vocab_parallel_logits, group=group, topk=topk, vocab_size=vocab_size, impl=impl)
    rows = vocab_parallel_logits.reshape(-1, vocab_parallel_logits.shape[-1])
    return compute_entropy(rows, plan).reshape(vocab_parallel_logits.shape[:-1])


class _TokenLoss(torch.autograd.Function):
    """Forward: one read of the logits and the exchange. Backward: one read, one write, no communication."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, target: Tensor, plan: Plan, gate: BoundGate, compact: bool, inplace: bool
    ) -> tuple[Tensor | None, ...]:
        keep = (~plan.ignored(target)).nonzero().squeeze(1) if compact else None
        kept_target = target if keep is None else target[keep]
        statistics = start_statistics(rows, kept_target, plan, keep=keep)()
        slope, outputs = apply_gate(ctx, statistics, target, keep, plan, gate)
        ctx.save_for_backward(rows, kept_target, keep, statistics.maximum, statistics.sum_exp, slope)
        ctx.plan, ctx.inplace = plan, inplace
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, target, keep, maximum, sum_exp, slope = ctx.saved_tensors
        gradient = rows.detach() if ctx.inplace and not _overlaps_itself(rows) else torch.empty_like(rows)
        upstream = grad_loss if keep is None else grad_loss[keep]
        write_gradient(rows, target, maximum, sum_exp, slope, upstream, ctx.plan, gradient, keep=keep)
        return gradient, None, None, None, None, None


def _overlaps_itself(rows: Tensor) -> bool:
    """Whether two elements of ``[N, V]`` may lie in one place, as in an expanded tensor: no room for two gradients."""
    (step, count), (stride, number) = sorted(zip(rows.stride(), rows.shape, strict=True))
    return (step == 0 and count > 1) or (number > 1 and stride <= step * (count - 1))
