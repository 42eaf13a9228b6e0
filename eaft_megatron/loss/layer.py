"""The output layer under linear.py: its arguments, checked before anything is computed or sent, and its chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.collectives import group_rank_and_size
from eaft_megatron.loss.hidden_states import gather_sequence
from eaft_megatron.loss.plan import Plan


@dataclasses.dataclass(frozen=True)
class Layer:
    """The checked arguments of the output layer, beside those of the loss."""

    plan: Plan
    chunk: int
    scale: float
    sequence_parallel: bool
    into_main_grad: bool
    weight_grad_dtype: torch.dtype
    drop: bool
    max_valid: int | None

    def rows(self, hidden: Tensor) -> Tensor:
        """``[N, H]`` hidden states of all tokens."""
        if self.sequence_parallel:
            hidden = gather_sequence(hidden, self.plan.group)
        return hidden.reshape(-1, hidden.shape[-1])

    def keep(self, target: Tensor) -> Tensor | None:
        """``[M]`` indices of the rows to look at, in their order; None for all N."""
        valid = target != self.plan.ignore_index
        if self.drop:
            return valid.nonzero().squeeze(1)
        if self.max_valid is None:
            return None
        # Those that count come first; what remains below the bound is ignored tokens.
        return valid.to(torch.uint8).argsort(descending=True, stable=True)[: self.max_valid]

    def chunks(
        self, rows: Tensor, weight: Tensor, target: Tensor, keep: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """``(which of the M rows looked at, their hidden states, their logits)``; ``target`` is ``[M]``.

        The logits lie in a buffer that the next chunk takes over, and may be written to.
        """
        total = target.shape[0]
        buffer = rows.new_empty((min(self.chunk, total), weight.shape[0]))
        for begin in range(0, total, self.chunk):
            part = slice(begin, min(begin + self.chunk, total))
            hidden = rows[part] if keep is None else rows[keep[part]]
            if not self.drop:  # what an ignored token's hidden states hold must not reach the weight, NaN included
                hidden = hidden.masked_fill((target[part] == self.plan.ignore_index).unsqueeze(1), 0)
            logits = buffer[: part.stop - begin]
            logits.addmm_(hidden, weight.t(), beta=0, alpha=self.scale)
            yield part, hidden, logits


def imagined_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """A tensor of the whole logits' shape, dtype and device that holds a single number."""
    given = f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
    if weight.dim() != 2 or hidden.dim() < 1 + sequence_parallel or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden must be [..., H] and weight [V_local, H], got {given}")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden and weight must have one dtype and one device, got {given}, on {hidden.device} and {weight.device}"
        )
    shape = list(hidden.shape[:-1])
    if sequence_parallel:
        shape[0] *= group_rank_and_size(group)[1]
    if list(target.shape) != shape:
        gathered = " gathered over the tensor-parallel group" if sequence_parallel else ""
        raise ValueError(
            f"target must have the shape of hidden{gathered} without the last dimension, {tuple(shape)}, "
            f"got {tuple(target.shape)}"
        )
    return hidden.new_empty(()).expand(*shape, weight.shape[0])


def check_options(
    weight: Tensor, chunk: int, scale: float, into_main_grad: bool, drop: bool | None, max_valid: int | None
) -> None:
    """``ValueError`` for an option that cannot be; the names are those of the public functions."""
    if chunk < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk}")
    if not math.isfinite(scale):
        raise ValueError(f"logits_scale must be finite, got {scale}")
    if max_valid is not None and (max_valid < 0 or drop is not None):
        raise ValueError(
            f"max_valid must be >= 0, and takes the place of drop_ignored: got max_valid={max_valid}, "
            f"drop_ignored={drop}"
        )
    if not into_main_grad:
        return
    if hasattr(weight, "__fsdp_param__"):
        raise ValueError("gradient_accumulation_fusion: a weight sharded by Megatron-FSDP is not supported")
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.shape != weight.shape:
        raise ValueError(
            f"gradient_accumulation_fusion needs weight.main_grad of shape {tuple(weight.shape)}, got "
            f"{None if main_grad is None else tuple(main_grad.shape)}"
        )
