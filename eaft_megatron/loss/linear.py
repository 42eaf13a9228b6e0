"""Output layer and loss in one, the logits never whole: the public functions and the autograd function under them.

Chunks of tokens pass through one buffer of ``[chunk_tokens, V_local]``, once forward (matrix product, statistics,
exchange) and once backward (matrix product again, gradient written over the logits, two matrix products with it). The
gate runs between the two, on all tokens at once, so that statistics of a batch are what they are on whole logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from eaft_megatron.loss.exchange import Statistics, compute_dtype
from eaft_megatron.loss.gate import Gate
from eaft_megatron.loss.gates import EAFTGate
from eaft_megatron.loss.inputs import BoundGate, check_loss_inputs
from eaft_megatron.loss.linear_backward import PendingSums, WeightGradient, scatter_sequence_sum
from eaft_megatron.loss.linear_inputs import LinearInputs, logits_like
from eaft_megatron.loss.options import EAFTLinearOptions, LinearOptions, LossOptions, refuse_options_of_other_gates
from eaft_megatron.loss.passes import apply_gate, differentiable_once, loss_and_stats, start_statistics, write_gradient
from eaft_megatron.loss.token_stats import TokenStats

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


@overload
def vocab_parallel_linear_eaft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[EAFTLinearOptions],
) -> Tensor: ...


@overload
def vocab_parallel_linear_eaft_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[EAFTLinearOptions]
) -> tuple[Tensor, TokenStats]: ...


@overload
def vocab_parallel_linear_eaft_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[EAFTLinearOptions]
) -> Tensor | tuple[Tensor, TokenStats]: ...


def vocab_parallel_linear_eaft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    entropy_norm: float | None = None,
    return_stats: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """The EAFT loss of ``logits = logits_scale * hidden @ weight.T``, which never exist as a whole.

    Loss and gradients are those of :func:`eaft_megatron.vocab_parallel_eaft_loss` on those logits, for any upstream
    gradient per token. The price is one matrix product more: the backward pass computes the logits again.

    Memory beyond the inputs and their gradients: one buffer of ``chunk_tokens x V_local`` numbers of the hidden
    states' dtype while a pass runs, 32 bytes a token from forward to backward, and in the backward pass the hidden
    gradient of the rows looked at where some are left out. With ``sequence_parallel`` also the gathered hidden states
    and, backward, their gradient.

    Collectives, with C chunks of the rows looked at: the exchange of each chunk forward, one all-reduce of each
    chunk's hidden gradient backward, both while the next chunk is computed. With ``sequence_parallel`` one all-gather
    of the hidden states forward and one backward, and one reduce-scatter of their gradient instead of the all-reduces.

    Args:
        hidden: ``[..., H]`` bf16, fp16, fp32 or fp64, the same on every rank of ``group``; with
            ``sequence_parallel`` this rank's slice of the first dimension.
        weight: ``[V_local, H]`` of the same dtype: this rank's rows of the output layer, or of the embedding tied to
            it. The layer has no bias.
        target: ``[...]`` int64 global ids, or ``ignore_index``, of all tokens; the same on every rank of ``group``.
        chunk_tokens: tokens per chunk, 4096. Larger is faster up to a few thousand, smaller takes less memory.
        sequence_parallel: ``hidden`` is a slice of the sequence: gathered here, and its gradient reduce-scattered.
        gradient_accumulation_fusion: add the weight's gradient into ``weight.main_grad``, as Megatron's option of
            this name does, and set ``weight.grad_added_to_main_grad`` where the weight has it.
        weight_grad_dtype: in which the weight's gradient is summed over chunks otherwise. None: float32 for half
            precision (which takes 4 bytes per parameter of this layer while the backward pass runs), else the
            weight's own.
        logits_scale: factor of the logits, as MuP has it; applied within the matrix product.
        drop_ignored: leave out the rows of ignored tokens before the matrix products, so that they cost nothing. It
            has to know their number, which on a GPU is one host sync. None (default): on the CPU only.
        max_valid: a bound, known on the host, on the number of tokens that are not ignored: the rows beyond it are
            left out without any sync. Tokens that do count and fall beyond a bound that is too low have a NaN loss.

    The other arguments and the return value are those of :func:`eaft_megatron.vocab_parallel_eaft_loss`; so is the
    contract that every rank of ``group`` gets bitwise the same loss, wherever its matrix products see the same bits.

    Raises:
        ValueError: shapes or dtypes that do not fit, a bad option, no ``main_grad`` where it is asked for, or a target
            outside the vocabulary (see ``validate``). Raised on every rank alike, before any collective.
    """
    refuse_options_of_other_gates("vocab_parallel_linear_eaft_loss", options)
    gate = EAFTGate(alpha=alpha, entropy_norm=entropy_norm)
    return vocab_parallel_linear_token_loss(hidden, weight, target, gate, return_stats=return_stats, **options)


@overload
def vocab_parallel_linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def vocab_parallel_linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, TokenStats]: ...


@overload
def vocab_parallel_linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: bool,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, TokenStats]: ...


def vocab_parallel_linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    chunk_tokens: int = 4096,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    weight_grad_dtype: torch.dtype | None = None,
    logits_scale: float = 1.0,
    drop_ignored: bool | None = None,
    max_valid: int | None = None,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """Per-token loss of any gate on ``logits = logits_scale * hidden @ weight.T``, which never exist as a whole.

    ``gate``, ``side``, ``sequence_ids`` and ``reduce_group`` are those of
    :func:`eaft_megatron.vocab_parallel_token_loss`; the rest is as in :func:`vocab_parallel_linear_eaft_loss`.
    """
    logits = logits_like(hidden, weight, target, options.get("group"), sequence_parallel)
    plan, bound_gate = check_loss_inputs(logits, target, gate, return_stats=return_stats, **options)
    inputs = LinearInputs(
        plan=plan,
        chunk_tokens=chunk_tokens,
        logits_scale=logits_scale,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        weight_grad_dtype=weight_grad_dtype,
        drop_ignored=target.device.type == "cpu" and max_valid is None if drop_ignored is None else drop_ignored,
        max_valid=max_valid,
    )
    inputs.check(weight, drop_ignored)
    outputs = _LinearTokenLoss.apply(hidden, weight, target.reshape(-1), inputs, bound_gate)
    return loss_and_stats(outputs, target.shape, plan, return_stats)


class _LinearTokenLoss(torch.autograd.Function):
    """Forward: one matrix product. Backward: three, the first of them the forward's again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, inputs: LinearInputs, gate: BoundGate
    ) -> tuple[Tensor | None, ...]:
        keep = inputs.kept_rows(target)
        kept_target = target if keep is None else target[keep]
        statistics = _statistics(inputs.rows(hidden), weight, kept_target, keep, inputs)
        slope, outputs = apply_gate(ctx, statistics, target, keep, inputs.plan, gate)
        slope = inputs.logits_scale * slope
        ctx.save_for_backward(hidden, weight, kept_target, keep, statistics.maximum, statistics.sum_exp, slope)
        ctx.inputs = inputs
        ctx.main_grad = getattr(weight, "main_grad", None) if inputs.gradient_accumulation_fusion else None
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, target, keep, maximum, sum_exp, slope = ctx.saved_tensors
        inputs, plan = ctx.inputs, ctx.inputs.plan
        rows, upstream = inputs.rows(hidden), grad_loss if keep is None else grad_loss[keep]
        to_hidden = to_weight = None
        if ctx.needs_input_grad[0]:
            to_hidden = rows.new_empty((target.shape[0], rows.shape[1]))
        if ctx.needs_input_grad[1]:
            to_weight = WeightGradient(weight, ctx.main_grad, inputs.weight_grad_dtype)
        sums = PendingSums(None if inputs.sequence_parallel else plan.group)
        for part, states, logits in inputs.chunks(rows, weight, target, keep):
            write_gradient(
                logits, target[part], maximum[part], sum_exp[part], slope[part], upstream[part], plan, logits
            )
            if to_hidden is not None:
                torch.mm(logits, weight, out=to_hidden[part])
                sums.add(to_hidden[part])
            if to_weight is not None:
                to_weight.add(logits, states)
        sums.wait()
        if to_hidden is not None:
            to_hidden = _hidden_gradient(to_hidden, rows.shape, keep, hidden, inputs)
        return to_hidden, None if to_weight is None else to_weight.result(), None, None, None


def _statistics(rows: Tensor, weight: Tensor, target: Tensor, keep: Tensor | None, inputs: LinearInputs) -> Statistics:
    """``[M]`` statistics of all chunks."""
    statistics = Statistics.empty(target, compute_dtype(rows.dtype), inputs.plan)

    def fill(part: slice, finish: Callable[[], Statistics]) -> None:
        for column, values in zip(statistics, finish(), strict=True):
            if column is not None and values is not None:
                column[part] = values

    pending = None  # a chunk's exchange is on its way while the next chunk's logits are made
    for part, _, logits in inputs.chunks(rows, weight, target, keep):
        started = start_statistics(logits, target[part], inputs.plan)
        if pending is not None:
            fill(*pending)
        pending = part, started
    if pending is not None:
        fill(*pending)
    return statistics


def _hidden_gradient(
    kept: Tensor, shape: torch.Size, keep: Tensor | None, hidden: Tensor, inputs: LinearInputs
) -> Tensor:
    """From the ``[M, H]`` rows looked at to the gradient of ``hidden`` as it was given."""
    gradient = kept if keep is None else kept.new_zeros(shape).index_copy_(0, keep, kept)
    if inputs.sequence_parallel:
        gradient = scatter_sequence_sum(gradient, inputs.plan.group)
    return gradient.view(hidden.shape)
