"""GLM-4 as a HybridModel: its two extra norms, and interleaved rotary embeddings.

Megatron-LM imports it with `--spec eaft_megatron.models.glm4_hybrid_spec GLM4_HYBRID_STACK_SPEC`, which needs
Transformer Engine and Megatron-LM 0.19 or later.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from eaft_megatron.megatron_map import (
    MLPLayer,
    ModuleSpec,
    TransformerLayer,
    hybrid_rotary_source,
    hybrid_stack_spec,
)
from eaft_megatron.models.glm4_spec import SandwichNormSubmodules, _normalise
from eaft_megatron.models.specs import norm_class

MENDS = ("rotary_interleaved",)
"""Options that HybridModel ignores, and this spec does not."""


def _norm(module: Any, kind: type) -> Any:
    config = module.config
    return kind(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _is_passed_on() -> bool:
    return "rotary_interleaved" in hybrid_rotary_source()


class AttentionLayer(TransformerLayer):
    """x + norm(attention(norm(x))); x [s, b, h].

    HybridModel makes angles f0 f1 .. f0 f1 .. for halves that turn together; where neighbours do, each stands twice in
    a row: f0 f0 f1 f1 ... A release that gives its embedding the option does that itself, and is left alone.
    """

    def __init__(self, config: Any, submodules: SandwichNormSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.post_self_attn_layernorm = _norm(self, submodules.post_self_attn_layernorm)
        self.self_attention.register_forward_hook(partial(_normalise, self.post_self_attn_layernorm))
        self._interleaves = config.rotary_interleaved and not _is_passed_on()

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        if self._interleaves and rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1)
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


class FeedForwardLayer(MLPLayer):
    """x + norm(MLP(norm(x))); x [s, b, h]."""

    def __init__(self, config: Any, submodules: SandwichNormSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.post_mlp_layernorm = _norm(self, submodules.post_mlp_layernorm)
        self.mlp.register_forward_hook(partial(_normalise, self.post_mlp_layernorm))


def _with(spec: ModuleSpec, module: type, **norms: type) -> ModuleSpec:
    given = {field.name: getattr(spec.submodules, field.name) for field in fields(spec.submodules)}
    return ModuleSpec(module=module, params=spec.params, submodules=SandwichNormSubmodules(**given, **norms))


def _stack() -> ModuleSpec:
    norm, layers = norm_class("transformer_engine"), hybrid_stack_spec.submodules
    attention = _with(layers.attention_layer, AttentionLayer, post_self_attn_layernorm=norm)
    feed_forward = _with(layers.mlp_layer, FeedForwardLayer, post_mlp_layernorm=norm)
    submodules = replace(layers, attention_layer=attention, mlp_layer=feed_forward)
    return ModuleSpec(module=hybrid_stack_spec.module, params=hybrid_stack_spec.params, submodules=submodules)


GLM4_HYBRID_STACK_SPEC = _stack()
