"""Output layer and loss in one, the logits never whole: the public functions and the autograd function under them.

Chunks of tokens pass through one buffer of ``[chunk_tokens, V_local]``, once forward (matrix product, statistics,
exchange) and once backward (matrix product again, gradient written over the logits, two matrix products with it). The
gate runs between the two, on all tokens at once, so that statistics of a batch are what they are on whole logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.gates import EAFTGate, Gate
from eaft_megatron.loss.hidden_states import PendingSums, WeightGradient, scatter_sequence_sum
from eaft_megatron.loss.layer import Layer, check_options, imagined_logits
from eaft_megatron.loss.passes import Seen, begin_look, outputs_of, write_gradient
from eaft_megatron.loss.plan import check_target, gate_context, make_plan
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.torch_impl import compute_dtype


def vocab_parallel_linear_eaft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    topk: int = 20,
    alpha: float = 1.0,
    entropy_norm: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_tokens: int = 4096,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    weight_grad_dtype: torch.dtype | None = None,
    logits_scale: float = 1.0,
    impl: str = "auto",
    exchange: str = "packed",
    validate: bool | None = None,
    drop_ignored: bool | None = None,
    max_valid: int | None = None,
    return_stats: bool = False,
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
        chunk_tokens: tokens per chunk. Larger is faster up to a few thousand, smaller takes less memory.
        sequence_parallel: ``hidden`` is a slice of the sequence: gathered here, and its gradient reduce-scattered.
        gradient_accumulation_fusion: add the weight's gradient into ``weight.main_grad``, as Megatron's option of
            this name does, and set ``weight.grad_added_to_main_grad`` where the weight has it.
        weight_grad_dtype: in which the weight's gradient is summed over chunks otherwise. None: float32 for half
            precision (which takes 4 bytes per parameter of this layer while the backward pass runs), else the
            weight's own.
        logits_scale: factor of the logits, as MuP has it; applied within the matrix product.
        drop_ignored: leave out the rows of ignored tokens before the matrix products, so that they cost nothing. It
            has to know their number, which on a GPU is one host sync. None: on the CPU only.
        max_valid: a bound, known on the host, on the number of tokens that are not ignored: the rows beyond it are
            left out without any sync. Tokens that do count and fall beyond a bound that is too low have a NaN loss.

    The other arguments and the return value are those of :func:`eaft_megatron.vocab_parallel_eaft_loss`; so is the
    contract that every rank of ``group`` gets bitwise the same loss, wherever its matrix products see the same bits.

    Raises:
        ValueError: shapes or dtypes that do not fit, a bad option, no ``main_grad`` where it is asked for, or a target
            outside the vocabulary (see ``validate``). Raised on every rank alike, before any collective.
    """
    return vocab_parallel_linear_token_loss(
        hidden,
        weight,
        target,
        EAFTGate(alpha=alpha, entropy_norm=entropy_norm),
        group=group,
        topk=topk,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        weight_grad_dtype=weight_grad_dtype,
        logits_scale=logits_scale,
        impl=impl,
        exchange=exchange,
        validate=validate,
        drop_ignored=drop_ignored,
        max_valid=max_valid,
        return_stats=return_stats,
    )


def vocab_parallel_linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
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
    chunk_tokens: int = 4096,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    weight_grad_dtype: torch.dtype | None = None,
    logits_scale: float = 1.0,
    impl: str = "auto",
    exchange: str = "packed",
    validate: bool | None = None,
    drop_ignored: bool | None = None,
    max_valid: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Per-token loss of any gate on ``logits = logits_scale * hidden @ weight.T``, which never exist as a whole.

    ``gate``, ``side``, ``sequence_ids`` and ``reduce_group`` are those of
    :func:`eaft_megatron.vocab_parallel_token_loss`; the rest is as in :func:`vocab_parallel_linear_eaft_loss`.
    """
    if not isinstance(gate, Gate):
        raise ValueError(f"gate must be a Gate such as EAFTGate(), got {type(gate).__name__}")
    logits = imagined_logits(hidden, weight, target, group, sequence_parallel)
    plan = make_plan(logits, group, topk, vocab_size, impl, exchange)
    check_target(logits, target, plan.vocab_size, ignore_index, validate)
    gate.check(plan.k)
    check_options(weight, chunk_tokens, logits_scale, gradient_accumulation_fusion, drop_ignored, max_valid)
    if max_valid is None and drop_ignored is None:
        drop_ignored = target.device.type == "cpu"
    half = weight.dtype in (torch.bfloat16, torch.float16)
    layer = Layer(
        dataclasses.replace(
            plan,
            ignore_index=ignore_index,
            want_entropy=return_stats,
            context=gate_context(gate, target, side or {}, sequence_ids, reduce_group),
        ),
        chunk=chunk_tokens,
        scale=logits_scale,
        sequence_parallel=sequence_parallel,
        into_main_grad=gradient_accumulation_fusion,
        weight_grad_dtype=weight_grad_dtype or (torch.float32 if half else weight.dtype),
        drop=bool(drop_ignored),
        max_valid=max_valid,
    )
    loss, *stats = _LinearTokenLoss.apply(hidden, weight, target.reshape(-1), gate, layer)
    loss = loss.reshape(target.shape)
    if not return_stats:
        return loss
    return loss, TokenStats(*stats[:4], topk=plan.k, sum_p_squared=stats[4]).reshape(target.shape)


class _LinearTokenLoss(torch.autograd.Function):
    """Forward: one matrix product. Backward: three, the first of them the forward's again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, gate: Gate, layer: Layer):
        keep = layer.keep(target)
        looked_at = target if keep is None else target[keep]
        found = _statistics(layer.rows(hidden), weight, looked_at, keep, gate, layer)
        stats = _token_stats(found, target, keep, layer)
        output = gate(stats, layer.plan.context)
        slope = layer.scale * (output.slope if keep is None else output.slope[keep])
        ctx.save_for_backward(hidden, weight, looked_at, keep, found["maximum"], found["sum_exp"], slope)
        ctx.layer, ctx.main_grad = layer, weight.main_grad if layer.into_main_grad else None
        return outputs_of(ctx, output, stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        hidden, weight, target, keep, maximum, sum_exp, slope = ctx.saved_tensors
        layer, plan = ctx.layer, ctx.layer.plan
        rows, upstream = layer.rows(hidden), grad_loss if keep is None else grad_loss[keep]
        to_hidden = to_weight = None
        if ctx.needs_input_grad[0]:
            to_hidden = rows.new_empty((target.shape[0], rows.shape[1]))
        if ctx.needs_input_grad[1]:
            to_weight = WeightGradient(weight, ctx.main_grad, layer.weight_grad_dtype)
        sums = PendingSums(None if layer.sequence_parallel else plan.group)
        for part, states, logits in layer.chunks(rows, weight, target, keep):
            per_token = (tensor[part] for tensor in (target, maximum, sum_exp, slope, upstream))
            write_gradient(logits, *per_token, plan, logits)
            if to_hidden is not None:
                torch.mm(logits, weight, out=to_hidden[part])
                sums.add(to_hidden[part])
            if to_weight is not None:
                to_weight.add(logits, states)
        sums.wait()
        if to_hidden is not None:
            to_hidden = _hidden_gradient(to_hidden, rows.shape, keep, hidden, layer)
        return to_hidden, to_weight and to_weight.result(), None, None, None


def _statistics(
    rows: Tensor, weight: Tensor, target: Tensor, keep: Tensor | None, gate: Gate, layer: Layer
) -> dict[str, Tensor]:
    """``[M]`` numbers of the whole vocabulary by name: the fields of TokenStats, "maximum" and "sum_exp"."""
    entropy, squares = layer.plan.want_entropy or "entropy" in gate.needs, "sum_p_squared" in gate.needs
    names = ["maximum", "sum_exp", "ce"] + ["entropy"] * entropy + ["sum_p_squared"] * squares
    found = {name: torch.zeros(target.shape, dtype=compute_dtype(rows), device=rows.device) for name in names}

    def note(part: slice, finish: Callable[[], Seen]) -> None:
        seen = finish()
        for name, column in found.items():
            column[part] = getattr(seen if name in ("maximum", "sum_exp") else seen.stats, name)

    pending = None  # a chunk's exchange is on its way while the next chunk's logits are made
    for part, _, logits in layer.chunks(rows, weight, target, keep):
        begun = begin_look(logits, target[part], layer.plan, entropy=entropy, squares=squares)
        if pending is not None:
            note(*pending)
        pending = part, begun
    if pending is not None:
        note(*pending)
    return found


def _token_stats(found: dict[str, Tensor], target: Tensor, keep: Tensor | None, layer: Layer) -> TokenStats:
    """All ``[N]`` tokens as the gate sees them: zeros at ignored ones, NaN at those beyond a bound too low."""
    valid = target != layer.plan.ignore_index

    def spread(name: str, beyond: float = 0.0) -> Tensor | None:
        values = found.get(name)
        if keep is None or values is None:
            return values
        column = torch.zeros(target.shape, dtype=values.dtype, device=values.device)
        return column.masked_fill_(valid, beyond).index_copy_(0, keep, values)

    return TokenStats(
        ce=spread("ce", beyond=float("nan")),
        entropy=spread("entropy"),
        weight=None,
        valid=valid,
        topk=layer.plan.k,
        sum_p_squared=spread("sum_p_squared"),
    )


def _hidden_gradient(looked_at: Tensor, shape: torch.Size, keep: Tensor | None, hidden: Tensor, layer: Layer) -> Tensor:
    """From the ``[M, H]`` rows looked at to the gradient of ``hidden`` as it was given."""
    gradient = looked_at if keep is None else looked_at.new_zeros(shape).index_copy_(0, keep, looked_at)
    if layer.sequence_parallel:
        gradient = scatter_sequence_sum(gradient, layer.plan.group)
    return gradient.view(hidden.shape)
