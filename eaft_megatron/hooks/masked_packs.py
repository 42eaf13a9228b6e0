"""Packs whose rows an attention mask keeps apart: only megatron-core's local attention obeys one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch


def check_built_models() -> None:
    """Have the models looked at as soon as Megatron-LM has built them, before anything is trained."""
    from eaft_megatron.megatron_map import training

    original = training.setup_model_and_optimizer

    @functools.wraps(original)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any):
        result = original(*args, **kwargs)
        refuse_attention_without_mask(result[0])
        return result

    training.setup_model_and_optimizer = setup_model_and_optimizer


def refuse_attention_without_mask(models: Iterable[torch.nn.Module]) -> None:
    """``ValueError`` if some attention of ``models`` is not megatron-core's own, whatever the flags said.

    Transformer Engine's causal attention ignores the mask, so that a token would see the rows before it in its pack.
    """
    from eaft_megatron.megatron_map import DotProductAttention

    for model in models:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "core_attention" and not isinstance(module, DotProductAttention):
                raise ValueError(
                    f"the model's attention is {type(module).__name__}, which ignores the mask that would keep the "
                    "rows of a pack apart, although --transformer-impl local was given: its layer spec (--spec) says "
                    "otherwise. Give --transformer-impl transformer_engine with --sft and "
                    "--no-create-attention-mask-in-dataloader, or --sft-packing none (one row a sample)"
                )
