"""GPTModel and its layer spec. Nothing here initialises weights: a parameter nobody loads stays NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eaft_megatron.megatron_map import stage_argument
from eaft_megatron.models.architecture import find_entry
from eaft_megatron.models.chunks import parameters
from eaft_megatron.models.config_fields import is_tied
from eaft_megatron.models.hf_config import architecture_of
from eaft_megatron.models.megatron_config import padded_vocab_size
from eaft_megatron.models.specs import local_spec, norm_class, transformer_engine_spec

if TYPE_CHECKING:
    from eaft_megatron.megatron_map import GPTModel, ModuleSpec, TransformerConfig

_IMPLEMENTATIONS = ("local", "transformer_engine")


def layer_spec(hf_config: dict, config: TransformerConfig, transformer_impl: str = "local") -> ModuleSpec:
    """megatron-core's spec of one transformer layer.

    transformer_impl: "local" (megatron-core's own modules and torch's RMSNorm, whatever Apex or Transformer Engine
        may be installed) or "transformer_engine".

    Raises:
        ValueError: an unknown transformer_impl, Transformer Engine asked for and not installed, or context
            parallelism, which local modules do not offer.
    """
    if transformer_impl not in _IMPLEMENTATIONS:
        raise ValueError(f"--transformer-impl {transformer_impl}: use {' or '.join(_IMPLEMENTATIONS)}")
    from eaft_megatron.megatron_map import gpt_layer_specs

    if transformer_impl == "transformer_engine":
        if not gpt_layer_specs.HAVE_TE:
            raise ValueError(
                "--transformer-impl transformer_engine: Transformer Engine cannot be imported; install it "
                "(pip install transformer-engine[pytorch], needs a GPU build) or use --transformer-impl local"
            )
        return _with_extra_norms(transformer_engine_spec(config.qk_layernorm), hf_config, transformer_impl)
    if config.context_parallel_size > 1:
        raise ValueError(
            "--context-parallel-size needs --transformer-impl transformer_engine: the local attention has none"
        )
    return _with_extra_norms(local_spec(config.qk_layernorm), hf_config, transformer_impl)


def _with_extra_norms(spec: ModuleSpec, hf_config: dict, transformer_impl: str) -> ModuleSpec:
    if not architecture_of(hf_config).sandwich_norms:
        return spec
    from eaft_megatron.models.glm4_spec import with_sandwich_norms

    return with_sandwich_norms(spec, norm_class(transformer_impl))


def build_model(
    hf_config: dict,
    config: TransformerConfig,
    *,
    transformer_impl: str = "local",
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    max_sequence_length: int | None = None,
    make_vocab_size_divisible_by: int = 128,
) -> GPTModel:
    """One GPTModel (or pipeline stage, or virtual chunk of one) for `load_hf_weights`; logits [b, s, padded V / tp].

    Parameters are NaN until loaded, unless config.perform_initialization is set. max_sequence_length defaults to the
    model's max_position_embeddings. A collective over the embedding group where embeddings are tied and pipeline
    parallelism is used (megatron-core's, in GPTModel's constructor).

    Raises:
        ValueError: see `layer_spec`; both pre_process and post_process on one of several pipeline stages.
    """
    if config.pipeline_model_parallel_size > 1 and pre_process and post_process:
        raise ValueError(
            "build_model: pre_process and post_process cannot both be true with "
            f"{config.pipeline_model_parallel_size} pipeline stages: true on the first and on the last one only"
        )
    spec = layer_spec(hf_config, config, transformer_impl)
    from eaft_megatron.megatron_map import GPTModel

    fields = {
        "max_sequence_length": max_sequence_length or hf_config.get("max_position_embeddings", 2048),
        "pre_process": pre_process,
        "post_process": post_process,
        "parallel_output": True,
        "share_embeddings_and_output_weights": is_tied(hf_config),
        "position_embedding_type": "rope",
        **architecture_of(hf_config).model_fields(hf_config),
    }
    fields |= stage_argument(GPTModel, vp_stage)
    vocab = padded_vocab_size(hf_config["vocab_size"], config.tensor_model_parallel_size, make_vocab_size_divisible_by)
    model = GPTModel(config, _block_spec(spec, config, transformer_impl, vp_stage), vocab, **fields)
    if not config.perform_initialization:
        _mark_tensor_parallel(model, hf_config)
        _fill_with_nan(model)
    return model


def _block_spec(spec: ModuleSpec, config: TransformerConfig, transformer_impl: str, vp_stage: int | None):
    """The layers of this stage with the final norm named: left alone, megatron-core takes Transformer Engine's, or
    Apex's LayerNorm, by what happens to be installed, whatever the layers use."""
    from eaft_megatron.megatron_map import transformer_block

    count = transformer_block.get_num_layers_to_build
    layers = count(config, **stage_argument(count, vp_stage))
    return transformer_block.TransformerBlockSubmodules(
        layer_specs=[spec] * layers, layer_norm=norm_class(transformer_impl)
    )


def _mark_tensor_parallel(model: GPTModel, hf_config: dict) -> None:
    """Say which parameters are split over the ranks. megatron-core's local linear layers say it only when they
    initialise their weights, and its gradient norm takes an unmarked parameter for a copy and counts one rank's."""
    table = architecture_of(hf_config).table(is_tied(hf_config))
    parameter: Any  # takes Megatron's marks
    for name, _, parameter in parameters([model]):
        partition = find_entry(table, name).kind.partition
        if partition and not getattr(parameter, "tensor_model_parallel", False):
            marks = zip(("partition_dim", "partition_stride"), partition, strict=True)
            vars(parameter).update(tensor_model_parallel=True, **dict(marks))


@torch.no_grad()
def _fill_with_nan(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(float("nan"))
