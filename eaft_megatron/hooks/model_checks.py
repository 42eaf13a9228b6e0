"""What a model must be like for this loss to be right: looked at where it computes its loss, whatever built it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_model(model: torch.nn.Module, arguments: Mapping[str, Any], name: str) -> None:
    """``ValueError`` if ``model`` makes its loss in a way that ``name``, the method, cannot take the place of.

    Args:
        arguments: of the model's method that computes logits and loss, by name.
    """
    config: Any = model.config
    if config.tensor_model_parallel_size > 1:
        gathers = arguments.get("runtime_gather_output")
        if not getattr(model, "parallel_output", True) if gathers is None else gathers:
            flag = "parallel_output=False" if gathers is None else "runtime_gather_output"
            raise ValueError(
                f"{name} needs logits that are sharded over the tensor-parallel ranks; {flag} of "
                f"{type(model).__name__} gathers them, and their gradient would be lost: build and call the model "
                "without it"
            )
    fusion = getattr(config, "cross_entropy_fusion_impl", "native")
    if getattr(config, "cross_entropy_loss_fusion", False) and fusion == "linear":
        raise ValueError(
            "cross_entropy_fusion_impl 'linear' computes the loss within the output layer, where "
            f"{name} cannot reach it: remove --cross-entropy-loss-fusion (--eaft-linear-chunk does the same for it)"
        )
