"""megatron-core's layer specs with the norms named, and the local one's RMSNorm. Importing this needs torch alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from eaft_megatron.megatron_map import ModuleSpec, TransformerConfig


def local_spec(qk_layernorm: bool = False) -> ModuleSpec:
    """One layer of megatron-core's own modules with torch's RMSNorm, whatever else may be installed."""
    from eaft_megatron.megatron_map import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LocalRMSNorm
    if qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    return spec


def transformer_engine_spec(qk_layernorm: bool = False) -> ModuleSpec:
    """One layer of Transformer Engine's modules, which must be installed."""
    from eaft_megatron.megatron_map import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)


def norm_class(transformer_impl: str) -> type:
    """The norm that stands alone in a model of this implementation."""
    if transformer_impl == "local":
        return LocalRMSNorm
    from eaft_megatron.megatron_map import TENorm

    return TENorm


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor megatron-core expects.

    megatron-core's own wrapper around the same class refuses sequence parallelism, for which nothing is missing but
    the mark on the parameter by which finalize_model_grads sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert config.normalization == "RMSNorm", config.normalization
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
