"""``LayerNorm`` and ``RMSNorm``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaft_megatron.testing.te_standin.base import Module, mark_sequence_parallel


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """Over the last dimension: RMSNorm without a bias, LayerNorm with one; ``zero_centered``: the weight is w + 1."""
    weight = weight + 1 if zero_centered else weight
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _Norm(Module):
    has_bias: ClassVar[bool]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        size: Any = hidden_size if normalized_shape is None else normalized_shape
        shape = (size,) if isinstance(size, int) else tuple(size)
        made: dict[str, Any] = {"dtype": params_dtype, "device": device}
        self.add_parameter("weight", shape, nn.init.zeros_ if zero_centered_gamma else nn.init.ones_, **made)
        self.register_parameter("bias", None)
        if self.has_bias:
            self.add_parameter("bias", shape, nn.init.zeros_, **made)
        if sequence_parallel is not None:
            for parameter in self.parameters():
                mark_sequence_parallel(parameter, sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class RMSNorm(_Norm):
    """Over the last dimension, with a weight."""

    has_bias = False


class LayerNorm(_Norm):
    """Over the last dimension, with a weight and a bias."""

    has_bias = True
