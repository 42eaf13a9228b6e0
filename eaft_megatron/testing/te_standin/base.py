"""What every module of the stand-in has: parameters with megatron-core's marks, and an ``_extra_state``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eaft_megatron.testing.te_standin.unsupported import refuse


class Module(nn.Module):
    """``TransformerEngineBaseModule`` without fp8.

    The extra state is an empty uint8 tensor, as TE's is without fp8: megatron-core's checkpoints carry a key for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.tp_group: Any = None

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Nothing to prepare."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        if state is None or (isinstance(state, Tensor) and state.numel() == 0):
            return
        refuse("the fp8 state that this checkpoint holds")

    def add_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        init: Callable[[Tensor], Any],
        *,
        dtype: torch.dtype | None,
        device: Any,
        region: contextlib.AbstractContextManager | None = None,
    ) -> nn.Parameter:
        """Register a parameter and fill it, within ``region``: a fork of megatron-core's random states."""
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.register_parameter(name, parameter)
        with region or contextlib.nullcontext(), torch.no_grad():
            init(parameter)
        return parameter


def mark_sharded(parameter: Tensor, dim: int) -> None:
    """The parameter is one tensor-parallel rank's part along ``dim``."""
    vars(parameter).update(tensor_model_parallel=True, partition_dim=dim, partition_stride=1)


def mark_sequence_parallel(parameter: Tensor, on: bool) -> None:
    """megatron-core sums its gradient over the tensor-parallel ranks, each of which saw other tokens."""
    vars(parameter).update(sequence_parallel=on)
