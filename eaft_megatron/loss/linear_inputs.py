"""The linear loss's own arguments, checked before anything is computed or sent, and its logits, chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.exchange import all_gather_rows
from eaft_megatron.loss.plan import Plan, group_rank_and_size


@dataclasses.dataclass(frozen=True)
class LinearInputs:
    """The arguments of the output layer, beside those that all losses share; names as in linear.py."""

    plan: Plan
    chunk_tokens: int
    logits_scale: float
    sequence_parallel: bool
    gradient_accumulation_fusion: bool
    weight_grad_dtype: torch.dtype | None
    drop_ignored: bool
    max_valid: int | None

    def check(self, weight: Tensor, drop_ignored: bool | None) -> None:
        """``ValueError`` for an option that cannot be; ``drop_ignored`` as the caller gave it."""
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be >= 1, got {self.chunk_tokens}")
        if not math.isfinite(self.logits_scale):
            raise ValueError(f"logits_scale must be finite, got {self.logits_scale}")
        if self.max_valid is not None and (self.max_valid < 0 or drop_ignored is not None):
            raise ValueError(
                f"max_valid must be >= 0, and takes the place of drop_ignored: got max_valid={self.max_valid}, "
                f"drop_ignored={drop_ignored}"
            )
        if self.gradient_accumulation_fusion:
            _check_main_grad(weight)

    def rows(self, hidden: Tensor) -> Tensor:
        """``[N, H]`` hidden states of all tokens; with sequence parallelism one all-gather of N x H / tp numbers."""
        if self.sequence_parallel:
            hidden = all_gather_rows(hidden, self.plan.group).flatten(0, 1)
        return hidden.reshape(-1, hidden.shape[-1])

    def kept_rows(self, target: Tensor) -> Tensor | None:
        """``[M]`` indices of the rows to look at, in their order; None for all N."""
        valid = ~self.plan.ignored(target)
        if self.drop_ignored:
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
        buffer = rows.new_empty((min(self.chunk_tokens, total), weight.shape[0]))
        for begin in range(0, total, self.chunk_tokens):
            part = slice(begin, min(begin + self.chunk_tokens, total))
            hidden = rows[part] if keep is None else rows[keep[part]]
            if not self.drop_ignored:  # an ignored token's hidden states must not reach the weight, NaN included
                hidden = hidden.masked_fill(self.plan.ignored(target[part]).unsqueeze(1), 0)
            logits = buffer[: part.stop - begin]
            logits.addmm_(hidden, weight.t(), beta=0, alpha=self.logits_scale)
            yield part, hidden, logits


def logits_like(
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


def _check_main_grad(weight: Tensor) -> None:
    if hasattr(weight, "__fsdp_param__"):
        raise ValueError("gradient_accumulation_fusion: a weight sharded by Megatron-FSDP is not supported")
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.shape != weight.shape:
        raise ValueError(
            f"gradient_accumulation_fusion needs weight.main_grad of shape {tuple(weight.shape)}, got "
            f"{None if main_grad is None else tuple(main_grad.shape)}"
        )
