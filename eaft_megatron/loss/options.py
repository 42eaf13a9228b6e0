"""The keyword arguments of the losses, for type checkers; the public functions' docstrings say what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor


class LossOptions(TypedDict, total=False):
    """Those of every loss; the last three are for gates other than EAFT's."""

    group: dist.ProcessGroup | None
    topk: int
    vocab_size: int | None
    ignore_index: int
    impl: str
    exchange: str
    validate: bool | None
    side: Mapping[str, Tensor] | None
    sequence_ids: Tensor | None
    reduce_group: dist.ProcessGroup | None


class LogitsOptions(LossOptions, total=False):
    """Of the losses that take logits."""

    inplace_backward: bool
    compact_ignored: bool | None


class LinearOptions(LossOptions, total=False):
    """Of the losses that take hidden states and the output layer's weight."""

    chunk_tokens: int
    sequence_parallel: bool
    gradient_accumulation_fusion: bool
    weight_grad_dtype: torch.dtype | None
    logits_scale: float
    drop_ignored: bool | None
    max_valid: int | None


class _EAFTGate(TypedDict, total=False):
    alpha: float
    entropy_norm: float | None


class EAFTLogitsOptions(LogitsOptions, _EAFTGate): ...


class EAFTLinearOptions(LinearOptions, _EAFTGate): ...


def refuse_options_of_other_gates(function: str, options: Mapping[str, object]) -> None:
    """``TypeError`` for what EAFT's gate would not look at, as for any argument that a function does not have."""
    for name in ("side", "sequence_ids", "reduce_group"):
        if name in options:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}: it is for the gates of "
                f"{function.replace('eaft', 'token')}()"
            )
