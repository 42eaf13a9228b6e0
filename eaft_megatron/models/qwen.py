"""Dense Qwen: Qwen2 and Qwen2.5 (Qwen2ForCausalLM), Qwen3 (Qwen3ForCausalLM).

Both are Llama's table and a line or two: biases on query, key and value, or a norm on each head of query and key.
"""

from __future__ import annotations

from typing import Any

from eaft_megatron.models.architecture import Architecture, entry
from eaft_megatron.models.config_fields import (
    check_decoder,
    check_given,
    check_no_sliding_window,
    check_whole_head_rotates,
    decoder_fields,
    refuse,
    rope_fields,
)
from eaft_megatron.models.llama import LLAMA
from eaft_megatron.models.transforms import QKV_ROWS, REPLICATED

_ATTENTION, _HF = "decoder.layers.{i}.self_attention.", "model.layers.{i}.self_attn."


def _check(hf_config: dict) -> None:
    check_decoder(hf_config)
    check_given(hf_config, "num_key_value_heads", "rms_norm_eps")
    check_no_sliding_window(hf_config)
    check_whole_head_rotates(hf_config)


def _check_qwen3(hf_config: dict) -> None:
    _check(hf_config)
    check_given(hf_config, "head_dim")
    if hf_config.get("attention_bias"):
        refuse("attention_bias", hf_config["attention_bias"], "the weight table of Qwen3 has no biases")


def _qwen2_fields(hf_config: dict) -> dict[str, Any]:
    return {**decoder_fields(hf_config), "add_qkv_bias": True}


def _qwen3_fields(hf_config: dict) -> dict[str, Any]:
    return {**decoder_fields(hf_config), "qk_layernorm": True}


QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    entries=(
        *LLAMA.entries,
        entry(
            _ATTENTION + "linear_qkv.bias",
            QKV_ROWS,
            (_HF + "q_proj.bias", "query"),
            (_HF + "k_proj.bias", "key_value"),
            (_HF + "v_proj.bias", "key_value"),
        ),
    ),
    check=_check,
    transformer_fields=_qwen2_fields,
    model_fields=rope_fields,
)

QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    entries=(
        *LLAMA.entries,
        entry(_ATTENTION + "q_layernorm.weight", REPLICATED, (_HF + "q_norm.weight", "head_dim")),
        entry(_ATTENTION + "k_layernorm.weight", REPLICATED, (_HF + "k_norm.weight", "head_dim")),
    ),
    check=_check_qwen3,
    transformer_fields=_qwen3_fields,
    model_fields=rope_fields,
)
