"""GLM-4-0414 (Glm4ForCausalLM): GLM-4-9B-0414 with biases on query, key and value, GLM-4-32B-0414 without.

Four norms a layer (glm4_spec.py), neighbouring pairs rotated in the first half of each head, gate and up in one
tensor. Not the older glm and chatglm models, which have other names.
"""

from __future__ import annotations

from typing import Any

from eaft_megatron.models.architecture import Architecture, entry
from eaft_megatron.models.config_fields import (
    check_decoder,
    check_given,
    decoder_fields,
    refuse,
    rope_fields,
    rope_type,
    rotary_share,
)
from eaft_megatron.models.transforms import FUSED_GATE_UP, QKV_ROWS, REPLICATED, ROW, VOCAB

_ROTARY_SHARE = 0.5  # transformers' default


def _check(hf_config: dict) -> None:
    check_decoder(hf_config)
    check_given(hf_config, "num_key_value_heads", "head_dim", "rms_norm_eps")
    field = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    kind = rope_type(hf_config.get(field) or {})
    if kind != "default":
        refuse(field, kind, 'GLM-4 has "default" only')
    share = rotary_share(hf_config, _ROTARY_SHARE)
    if not isinstance(share, (int, float)) or not 0 < share <= 1 or int(hf_config["head_dim"] * share) % 2:
        refuse("partial_rotary_factor", share, f"it must give an even part of head_dim = {hf_config['head_dim']}")


def _has_bias(hf_config: dict) -> bool:
    return bool(hf_config.get("attention_bias", True))  # transformers' default


def _transformer_fields(hf_config: dict) -> dict[str, Any]:
    return {**decoder_fields(hf_config), "add_qkv_bias": _has_bias(hf_config), "rotary_interleaved": True}


def _model_fields(hf_config: dict) -> dict[str, Any]:
    return {**rope_fields(hf_config), "rotary_percent": rotary_share(hf_config, _ROTARY_SHARE)}


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_BIAS = _LAYER + "self_attention.linear_qkv.bias"

GLM4 = Architecture(
    name="Glm4ForCausalLM",
    entries=(
        entry("embedding.word_embeddings.weight", VOCAB, ("model.embed_tokens.weight", "vocab", "hidden")),
        entry(
            (_LAYER + "input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight"),
            REPLICATED,
            (_HF + "input_layernorm.weight", "hidden"),
        ),
        entry(
            _LAYER + "self_attention.linear_qkv.weight",
            QKV_ROWS,
            (_HF + "self_attn.q_proj.weight", "query", "hidden"),
            (_HF + "self_attn.k_proj.weight", "key_value", "hidden"),
            (_HF + "self_attn.v_proj.weight", "key_value", "hidden"),
        ),
        entry(
            _BIAS,
            QKV_ROWS,
            (_HF + "self_attn.q_proj.bias", "query"),
            (_HF + "self_attn.k_proj.bias", "key_value"),
            (_HF + "self_attn.v_proj.bias", "key_value"),
        ),
        entry(_LAYER + "self_attention.linear_proj.weight", ROW, (_HF + "self_attn.o_proj.weight", "hidden", "query")),
        entry(
            _LAYER + "post_self_attn_layernorm.weight", REPLICATED, (_HF + "post_self_attn_layernorm.weight", "hidden")
        ),
        entry(
            (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
            REPLICATED,
            (_HF + "post_attention_layernorm.weight", "hidden"),  # before the MLP, as in Llama
        ),
        entry(_LAYER + "mlp.linear_fc1.weight", FUSED_GATE_UP, (_HF + "mlp.gate_up_proj.weight", "gate_up", "hidden")),
        entry(_LAYER + "mlp.linear_fc2.weight", ROW, (_HF + "mlp.down_proj.weight", "hidden", "ffn")),
        entry(_LAYER + "post_mlp_layernorm.weight", REPLICATED, (_HF + "post_mlp_layernorm.weight", "hidden")),
        entry("decoder.final_layernorm.weight", REPLICATED, ("model.norm.weight", "hidden")),
        entry("output_layer.weight", VOCAB, ("lm_head.weight", "vocab", "hidden")),
    ),
    check=_check,
    transformer_fields=_transformer_fields,
    model_fields=_model_fields,
    left_out=lambda hf_config: () if _has_bias(hf_config) else (_BIAS,),
    sandwich_norms=True,
)
