"""GLM-4's transformer layer for megatron-core: a norm on what attention and MLP give, before it joins the residual.

Megatron-LM imports it with `--spec eaft_megatron.models.glm4_spec GLM4_LAYER_SPEC_TE` (or `GLM4_LAYER_SPEC_LOCAL` with
`--transformer-impl local`). Its import looks the name up in vars(module), where functions are not called and a module's
__getattr__ is not asked: so both specs are made at import, the second only where Transformer Engine is installed.
Importing this needs megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from eaft_megatron.megatron_map import (
    IdentityOp,
    ModuleSpec,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    gpt_layer_specs,
)
from eaft_megatron.models.specs import LocalRMSNorm, local_spec, norm_class, transformer_engine_spec


@dataclass
class SandwichNormSubmodules(TransformerLayerSubmodules):
    """As megatron-core's, and the norms behind attention and MLP."""

    post_self_attn_layernorm: type = IdentityOp
    post_mlp_layernorm: type = IdentityOp


class SandwichNormLayer(TransformerLayer):
    """x + norm(attention(norm(x))), then x + norm(MLP(norm(x))); x [s, b, h].

    The extra norms are hooks on the two modules rather than part of the residual addition: that one runs with
    gradients enabled even under no_grad, and would keep the norms' inputs for a backward pass that never comes.
    """

    def __init__(
        self, config: TransformerConfig, submodules: SandwichNormSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        if getattr(config, "inference_fuse_tp_communication", False):
            raise ValueError("inference_fuse_tp_communication adds the residual before GLM-4's norm: leave it off")
        super().__init__(config, submodules, *args, **kwargs)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = submodules.post_self_attn_layernorm(**norm)
        self.post_mlp_layernorm = submodules.post_mlp_layernorm(**norm)
        self.self_attention.register_forward_hook(partial(_normalise, self.post_self_attn_layernorm))
        self.mlp.register_forward_hook(partial(_normalise, self.post_mlp_layernorm))


def _normalise(
    norm: nn.Module, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, None]:
    """A forward hook; megatron-core's modules give (output, bias that is still to be added)."""
    hidden, bias = output
    return norm(hidden if bias is None else hidden + bias), None


def with_sandwich_norms(spec: ModuleSpec, norm: type) -> ModuleSpec:
    """The spec of a TransformerLayer with the two norms added."""
    submodules = {field.name: getattr(spec.submodules, field.name) for field in fields(spec.submodules)}
    extra = SandwichNormSubmodules(**submodules, post_self_attn_layernorm=norm, post_mlp_layernorm=norm)
    return ModuleSpec(module=SandwichNormLayer, params=spec.params, submodules=extra)


GLM4_LAYER_SPEC_LOCAL = with_sandwich_norms(local_spec(), LocalRMSNorm)

if gpt_layer_specs.HAVE_TE:
    GLM4_LAYER_SPEC_TE = with_sandwich_norms(transformer_engine_spec(), norm_class("transformer_engine"))


def __getattr__(name: str) -> Any:
    if name == "GLM4_LAYER_SPEC_TE":
        raise AttributeError(f"{name}: Transformer Engine cannot be imported; use GLM4_LAYER_SPEC_LOCAL")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
