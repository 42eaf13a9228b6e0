"""Llama (LlamaForCausalLM): Llama 2 and 3, SmolLM2 and whatever else shares the architecture."""

from __future__ import annotations

from eaft_megatron.models.architecture import Architecture, entry
from eaft_megatron.models.config_fields import (
    check_decoder,
    check_whole_head_rotates,
    decoder_fields,
    refuse,
    rope_fields,
)
from eaft_megatron.models.transforms import GATE_UP, QKV_ROWS, REPLICATED, ROW, VOCAB


def _check(hf_config: dict) -> None:
    check_decoder(hf_config)
    for field in ("attention_bias", "mlp_bias"):
        if hf_config.get(field):
            refuse(field, hf_config[field], "the weight table has no biases")
    if hf_config.get("rope_interleaved"):
        refuse("rope_interleaved", True, "Llama rotates halves")
    check_whole_head_rotates(hf_config)


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."

LLAMA = Architecture(
    name="LlamaForCausalLM",
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
        entry(_LAYER + "self_attention.linear_proj.weight", ROW, (_HF + "self_attn.o_proj.weight", "hidden", "query")),
        entry(
            (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
            REPLICATED,
            (_HF + "post_attention_layernorm.weight", "hidden"),
        ),
        entry(
            _LAYER + "mlp.linear_fc1.weight",
            GATE_UP,
            (_HF + "mlp.gate_proj.weight", "ffn", "hidden"),
            (_HF + "mlp.up_proj.weight", "ffn", "hidden"),
        ),
        entry(_LAYER + "mlp.linear_fc2.weight", ROW, (_HF + "mlp.down_proj.weight", "hidden", "ffn")),
        entry("decoder.final_layernorm.weight", REPLICATED, ("model.norm.weight", "hidden")),
        entry("output_layer.weight", VOCAB, ("lm_head.weight", "vocab", "hidden")),
    ),
    check=_check,
    transformer_fields=decoder_fields,
    model_fields=rope_fields,
)
