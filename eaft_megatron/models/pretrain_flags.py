"""The flags of Megatron-LM's pretrain_gpt.py that build the model a config.json describes. Needs torch alone."""

from __future__ import annotations

from typing import Any

from eaft_megatron.megatron_map import SYMBOLS
from eaft_megatron.models.config_fields import is_tied
from eaft_megatron.models.hf_config import architecture_of
from eaft_megatron.models.hybrid_names import layer_pattern
from eaft_megatron.models.megatron_config import padded_vocab_size

_VALUES = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "normalization": "--normalization",
    "layernorm_epsilon": "--norm-epsilon",
    "hidden_dropout": "--hidden-dropout",
    "attention_dropout": "--attention-dropout",
    "init_method_std": "--init-method-std",
}
_SWITCHES = {
    "add_qkv_bias": "--add-qkv-bias",
    "qk_layernorm": "--qk-layernorm",
    "rotary_interleaved": "--rotary-interleaved",
}
# Written as their own lines below: the same in every family here.
_ALWAYS = {"gated_linear_unit", "activation_func", "add_bias_linear"}
# pretrain_gpt.py of core_v0.12.3 to core_v0.19.0 hands neither factor on to GPTModel, whose default is this.
_LLAMA3_FACTOR = 8.0
_IGNORED = "pretrain_gpt.py accepts a flag for the factor, and ignores it"
_SPEC_NAMES = {"local": "GLM4_LAYER_SPEC_LOCAL", "transformer_engine": "GLM4_LAYER_SPEC_TE"}


def pretrain_flags(
    hf_config: dict,
    *,
    transformer_impl: str = "transformer_engine",
    tensor_model_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 128,
) -> list[str]:
    """Flags, each name and each value an item of its own, for a model described by `read_hf_config`.

    Architecture only: no parallel sizes (tensor_model_parallel_size only sets the padded vocabulary, which is written
    out because Megatron-LM would derive it from the tokenizer, often shorter than the embedding), no batch, no
    tokenizer, no fusions but those the model cannot have. Every flag exists in core_v0.16.1 to core_v0.19.0.

    Raises:
        ValueError: an unknown transformer_impl, or a rotary base or scaling that pretrain_gpt.py cannot express.
    """
    if transformer_impl not in _SPEC_NAMES:
        raise ValueError(f"--transformer-impl {transformer_impl}: use {' or '.join(_SPEC_NAMES)}")
    architecture = architecture_of(hf_config)
    architecture.check(hf_config)
    fields = architecture.transformer_fields(hf_config)
    assert fields.keys() <= _VALUES.keys() | _SWITCHES.keys() | _ALWAYS, f"no flag for some of {list(fields)}"
    flags = ["--transformer-impl", transformer_impl]
    for name, flag in _VALUES.items():
        flags += [flag, str(fields[name])]
    flags += ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
    flags += [flag for name, flag in _SWITCHES.items() if fields.get(name)]
    if hf_config.get("max_position_embeddings"):
        flags += ["--max-position-embeddings", str(hf_config["max_position_embeddings"])]
    flags += _rotary_flags(architecture.model_fields(hf_config))
    if fields.get("rotary_interleaved"):
        flags.append("--no-rope-fusion")  # the fused kernels of older releases cannot interleave
    if not is_tied(hf_config):
        flags.append("--untie-embeddings-and-output-weights")
    vocab = hf_config["vocab_size"]
    padded = padded_vocab_size(vocab, tensor_model_parallel_size, make_vocab_size_divisible_by)
    flags += ["--vocab-size", str(vocab), "--padded-vocab-size", str(padded)]
    flags += ["--make-vocab-size-divisible-by", str(make_vocab_size_divisible_by)]
    if architecture.sandwich_norms:
        flags += ["--spec", "eaft_megatron.models.glm4_spec", _SPEC_NAMES[transformer_impl]]
    return flags


def pretrain_hybrid_flags(hf_config: dict, *, pipeline_model_parallel_size: int = 1, **options: Any) -> list[str]:
    """Flags of pretrain_hybrid.py (Megatron-LM 0.19 on), which loads the same checkpoint; options: `pretrain_flags`'s.

    One symbol of the pattern a layer, ``*-`` for a block, ``|`` where a pipeline stage ends.

    Raises:
        ValueError: as `pretrain_flags`; rotary scaling, which HybridModel ignores; fewer blocks than stages.
    """
    flags = pretrain_flags(hf_config, transformer_impl="transformer_engine", **options)
    if "--use-rope-scaling" in flags:
        raise ValueError("config.json: rotary scaling: HybridModel ignores --use-rope-scaling; use pretrain_gpt.py")
    depth = flags.index("--num-layers")
    pattern = layer_pattern(int(flags[depth + 1]), pipeline_model_parallel_size)
    flags[depth : depth + 2] = ["--hybrid-layer-pattern", pattern]
    if "--spec" in flags:
        del flags[flags.index("--spec") :]
        return [*flags, "--spec", "eaft_megatron.models.glm4_hybrid_spec", "GLM4_HYBRID_STACK_SPEC"]
    stack = SYMBOLS["hybrid_stack_spec"]
    return [*flags, "--spec", stack.module, stack.name]


def _rotary_flags(model_fields: dict[str, Any]) -> list[str]:
    """model_fields: GPTModel's keyword arguments."""
    base = model_fields["rotary_base"]
    if base != int(base):
        raise ValueError(f"config.json: rope_theta = {base!r}: --rotary-base takes whole numbers only")
    flags = ["--position-embedding-type", "rope", "--rotary-base", str(int(base))]
    flags += ["--rotary-percent", str(model_fields.get("rotary_percent", 1.0))]
    if "seq_len_interpolation_factor" in model_fields:
        factor = model_fields["seq_len_interpolation_factor"]
        raise ValueError(f"config.json: rotary scaling of type 'linear' (factor {factor}): {_IGNORED}")
    if model_fields.get("rope_scaling"):
        factor = model_fields["rope_scaling_factor"]
        if factor != _LLAMA3_FACTOR:
            raise ValueError(f"config.json: rotary scaling of type 'llama3' with factor {factor}: {_IGNORED}")
        flags += ["--use-rope-scaling", "--rope-scaling-factor", str(factor)]
    return flags
