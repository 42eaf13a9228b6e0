"""The arguments of the losses, checked before anything is computed or sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.collectives import group_rank_and_size
from eaft_megatron.loss.gates import Gate, GateContext
from eaft_megatron.loss.implementation import choose_triton
from eaft_megatron.loss.torch_impl import Shard

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked arguments, and what follows from them."""

    group: dist.ProcessGroup | None
    shard: Shard
    vocab_size: int
    k: int  # over the whole vocabulary
    k_local: int  # what each rank contributes
    exchange: str
    triton: bool
    ignore_index: int = -100
    inplace_backward: bool = False
    want_entropy: bool = False
    compact: bool = False
    context: GateContext = dataclasses.field(default_factory=GateContext)


def make_plan(logits: Tensor, group, topk: int, vocab_size: int | None, impl: str, exchange: str) -> Plan:
    """Check what concerns the logits; ``ValueError`` on every rank alike."""
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
    k = min(topk, vocab_size)
    triton = choose_triton(impl, logits, k)
    return Plan(group, Shard.of(rank, columns, vocab_size), vocab_size, k, min(k, columns), exchange, triton)


def check_target(logits: Tensor, target: Tensor, vocab_size: int, ignore_index: int, validate: bool | None) -> None:
    """``ValueError`` for a target that does not fit the logits; its values are looked at if ``validate`` says so."""
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
        outside = outside_vocabulary(target, vocab_size, ignore_index)
        if bool(outside.any()):
            where = outside.nonzero()[0].tolist()
            raise ValueError(
                f"target[{', '.join(map(str, where))}] = {int(target[outside][0])} is outside the vocabulary of "
                f"{vocab_size} (and is not ignore_index {ignore_index}); {int(outside.sum())} such target(s) of "
                f"shape {tuple(target.shape)}"
            )


def gate_context(gate: Gate, target: Tensor, side: Mapping[str, Tensor], sequence_ids, reduce_group) -> GateContext:
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


def outside_vocabulary(target: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    """Bool, shaped like ``target``."""
    return (target != ignore_index) & ((target < 0) | (target >= vocab_size))
