"""The arguments of the losses, checked before anything is computed or sent: ``ValueError`` on every rank alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.gate import Gate, GateContext, GateOutput
from eaft_megatron.loss.implementation import choose_triton
from eaft_megatron.loss.plan import Plan, Shard, group_rank_and_size
from eaft_megatron.loss.token_stats import TokenStats

BoundGate = Callable[[TokenStats], GateOutput]
"""A gate that has its side columns, sequences and group already."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TOY_COLUMNS = 128
"""Megatron pads a shard to a multiple of this, so that of a toy vocabulary one shard may hold all."""


def check_loss_inputs(
    logits: Tensor,
    target: Tensor,
    gate: Gate,
    *,
    return_stats: bool,
    group: dist.ProcessGroup | None = None,
    side: Mapping[str, Tensor] | None = None,
    sequence_ids: Tensor | None = None,
    reduce_group: dist.ProcessGroup | None = None,
    topk: int = 20,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    exchange: str = "packed",
    validate: bool | None = None,
) -> tuple[Plan, BoundGate]:
    """The arguments that all losses share, with their defaults; of the logits shape, dtype and device count."""
    if not isinstance(gate, Gate):
        raise ValueError(f"gate must be a Gate such as EAFTGate(), got {type(gate).__name__}")
    plan = make_plan(
        logits,
        group=group,
        topk=topk,
        vocab_size=vocab_size,
        impl=impl,
        exchange=exchange,
        ignore_index=ignore_index,
        entropy=return_stats or "entropy" in gate.needs,
        sum_squares="sum_p_squared" in gate.needs,
    )
    _check_target(logits, target, plan, validate)
    gate.check(plan.topk)
    context = _gate_context(gate, target, side or {}, sequence_ids, reduce_group)
    return plan, lambda stats: gate(stats, context)


def make_plan(
    logits: Tensor,
    *,
    group: dist.ProcessGroup | None,
    topk: int,
    vocab_size: int | None,
    impl: str,
    exchange: str = "packed",
    ignore_index: int = -100,
    entropy: bool = True,
    sum_squares: bool = False,
) -> Plan:
    """Check what concerns the logits."""
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be bfloat16, float16, float32 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., V_local] with V_local >= 1, got shape {tuple(logits.shape)}")
    if topk < 1:
        raise ValueError(f"topk (--eaft-topk) must be >= 1, got {topk}")
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
    if size > 1 and columns >= vocab_size and (columns == vocab_size or columns > _TOY_COLUMNS):
        raise ValueError(
            f"each of {size} tensor-parallel ranks holds {columns} columns, the whole vocabulary of {vocab_size}: "
            "these logits were gathered (parallel_output=False?), and their gradient would reach one rank alone. Give "
            "each rank its own columns, or group=None where every rank computes the whole loss"
        )
    topk = min(topk, vocab_size)
    k = topk if entropy else 1  # the maximum is needed in any case
    return Plan(
        group=group,
        shard=Shard.of(rank, columns, vocab_size),
        vocab_size=vocab_size,
        k=k,
        k_local=min(k, columns),
        topk=topk,
        exchange=exchange,
        triton=choose_triton(impl, logits, topk),
        ignore_index=ignore_index,
        entropy=entropy,
        sum_squares=sum_squares,
    )


def _check_target(logits: Tensor, target: Tensor, plan: Plan, validate: bool | None) -> None:
    """A target must fit the logits; its values are looked at if ``validate`` says so."""
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
        outside = plan.outside_vocabulary(target)
        if bool(outside.any()):
            index = ", ".join(map(str, outside.nonzero()[0].tolist()))
            raise ValueError(
                f"target[{index}] = {int(target[outside][0])} is outside the vocabulary of "
                f"{plan.vocab_size} (and is not ignore_index {plan.ignore_index}); {int(outside.sum())} such "
                f"target(s) of shape {tuple(target.shape)}"
            )


def _gate_context(
    gate: Gate,
    target: Tensor,
    side: Mapping[str, Tensor],
    sequence_ids: Tensor | None,
    reduce_group: dist.ProcessGroup | None,
) -> GateContext:
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
