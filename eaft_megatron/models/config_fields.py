"""Reading config.json: the parts decoder families share. Every refusal names the field. Needs torch alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from eaft_megatron.models.transforms import ModelSizes

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# megatron-core's rotary embedding has these written into it; only the factor is a parameter.
_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def refuse(field: str, value: Any, why: str) -> None:
    raise ValueError(f"config.json: {field} = {value!r} is not supported: {why}")


def heads_and_groups(hf_config: dict) -> tuple[int, int, int]:
    """(attention heads, KV groups, width of one head)."""
    heads = hf_config["num_attention_heads"]
    groups = hf_config.get("num_key_value_heads") or heads
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    return heads, groups, head_dim


def is_tied(hf_config: dict) -> bool:
    return bool(hf_config.get("tie_word_embeddings", False))


def model_sizes(hf_config: dict, padded_vocab: int) -> ModelSizes:
    heads, groups, head_dim = heads_and_groups(hf_config)
    return ModelSizes(
        hidden=hf_config["hidden_size"],
        ffn=hf_config["intermediate_size"],
        heads=heads,
        kv_groups=groups,
        head_dim=head_dim,
        vocab=hf_config["vocab_size"],
        padded_vocab=padded_vocab,
    )


def rope_fields(hf_config: dict, default_theta: float = 10000.0) -> dict[str, Any]:
    """GPTModel's rotary arguments, from either spelling: rope_parameters, or rope_theta and rope_scaling."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or hf_config.get("rope_theta") or default_theta
    fields: dict[str, Any] = {"rotary_base": theta}
    kind = rope_type(rope)
    if kind == "linear":
        fields["seq_len_interpolation_factor"] = float(rope["factor"])
    elif kind == "llama3":
        fields |= {"rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    return fields


def rotary_share(hf_config: dict, default: float) -> float:
    """The part of each head that rotates (partial_rotary_factor), from either place it is written in."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    for fields in (rope, hf_config):
        if fields.get("partial_rotary_factor") is not None:
            return fields["partial_rotary_factor"]
    return default


def rope_type(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def check_decoder(hf_config: dict) -> None:
    """Refuse what no supported family can honour; families add their own checks."""
    for field in _REQUIRED:
        if not isinstance(hf_config.get(field), int) or hf_config[field] < 1:
            raise ValueError(f"config.json: {field} must be a positive integer, not {hf_config.get(field)!r}")
    heads, groups, _ = heads_and_groups(hf_config)
    if heads % groups:
        refuse("num_key_value_heads", groups, f"it must divide num_attention_heads = {heads}")
    if not hf_config.get("head_dim") and hf_config["hidden_size"] % heads:
        refuse("num_attention_heads", heads, f"it must divide hidden_size = {hf_config['hidden_size']}")
    if hf_config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", hf_config["hidden_act"], 'only "silu" (SwiGLU) is')
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method", "?")
        refuse("quantization_config", method, "give the folder of the unquantised model")
    check_rope(hf_config)


def check_given(hf_config: dict, *fields: str) -> None:
    """Refuse to guess where transformers' default for the family is not the one derived from other fields."""
    for field in fields:
        value = hf_config.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"config.json: {field} must be given as a positive number, not {value!r}")


def check_no_sliding_window(hf_config: dict) -> None:
    """sliding_window alone is inactive in these families: use_sliding_window or layer_types turn it on."""
    if hf_config.get("use_sliding_window"):
        refuse("use_sliding_window", hf_config["use_sliding_window"], "every layer must attend to all tokens before")
    for kind in hf_config.get("layer_types") or ():
        if kind != "full_attention":
            refuse("layer_types", kind, 'every layer must be "full_attention"')


def check_whole_head_rotates(hf_config: dict) -> None:
    share = rotary_share(hf_config, default=1.0)
    if share != 1:
        refuse("partial_rotary_factor", share, "this architecture rotates the whole head")


def check_rope(hf_config: dict) -> None:
    """Refuse rotary variants other than default, linear and llama3."""
    field = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    rope = hf_config.get(field) or {}
    kind = rope_type(rope)
    if kind not in ("default", "linear", "llama3"):
        refuse(field, kind, 'megatron-core\'s rotary embedding offers "default", "linear" and "llama3"')
    if kind != "default" and not rope.get("factor"):
        raise ValueError(f"config.json: {field} of type {kind!r} needs a factor")
    if kind == "llama3":
        given = {name: rope.get(name) for name in _LLAMA3_ROPE}
        given["original_max_position_embeddings"] = rope.get("original_max_position_embeddings") or hf_config.get(
            "max_position_embeddings"
        )  # transformers falls back in the same way
        if given != _LLAMA3_ROPE:
            refuse(field, given, f"megatron-core has {_LLAMA3_ROPE} written into it")


def decoder_fields(hf_config: dict) -> dict[str, Any]:
    """TransformerConfig arguments of a pre-norm RMSNorm + SwiGLU + grouped-query decoder without biases."""
    heads, groups, head_dim = heads_and_groups(hf_config)
    return {
        "num_layers": hf_config["num_hidden_layers"],
        "hidden_size": hf_config["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "ffn_hidden_size": hf_config["intermediate_size"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.get("rms_norm_eps", 1e-6),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf_config.get("attention_dropout") or 0.0,
        "init_method_std": hf_config.get("initializer_range", 0.02),
    }
