"""Qwen2.5, Qwen3 and GLM-4-0414: what their config.json becomes, and what of it is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eaft_megatron.models import layer_spec, transformer_config
from eaft_megatron.models.hf_config import architecture_of
from eaft_megatron.models.pretrain_flags import pretrain_flags

_COMMON = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "max_position_embeddings": 32768}
QWEN25_7B = {
    **_COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_4B = {
    **_COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GLM4_9B = {
    **_COMMON,
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
}


@pytest.mark.parametrize(
    ("hf_config", "changes", "words"),
    [
        (QWEN25_7B, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN25_7B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
        (QWEN25_7B, {"num_key_value_heads": None}, "num_key_value_heads must be given"),
        (QWEN25_7B, {"rms_norm_eps": None}, "rms_norm_eps must be given"),
        (QWEN25_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = 'yarn'"),
        (QWEN3_4B, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN3_4B, {"attention_bias": True}, "attention_bias = True"),
        (QWEN3_4B, {"head_dim": None}, "head_dim must be given"),
        (QWEN3_4B, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters = 'yarn'"),
        (GLM4_9B, {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        (GLM4_9B, {"partial_rotary_factor": 0.03}, "even part of head_dim = 128"),
        (GLM4_9B, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling = 'linear'"),
        (GLM4_9B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (GLM4_9B, {"architectures": ["ChatGLMModel"]}, "ChatGLMModel; known here: Glm4ForCausalLM, Llama"),
        (GLM4_9B, {"architectures": ["GlmForCausalLM"]}, "is GlmForCausalLM; known here"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_values_we_cannot_honour_are_refused(hf_config, changes, words):
    """Before megatron-core is asked for anything; the message names the field."""
    with pytest.raises(ValueError, match=words):
        transformer_config({**hf_config, **changes})


def test_a_tensor_parallel_size_that_glm4_cannot_have():
    """The sizes that fit are named."""
    with pytest.raises(ValueError, match="32 attention heads do not divide by 3; .*: use 1, 2, 4, 8"):
        transformer_config(GLM4_9B, tensor_model_parallel_size=3)


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        (QWEN25_7B, {"add_qkv_bias": True, "qk_layernorm": False, "rotary_interleaved": False, "kv_channels": 128}),
        (QWEN3_4B, {"add_qkv_bias": False, "qk_layernorm": True, "rotary_interleaved": False, "kv_channels": 128}),
        (GLM4_9B, {"add_qkv_bias": True, "qk_layernorm": False, "rotary_interleaved": True, "kv_channels": 128}),
        ({**GLM4_9B, "attention_bias": False}, {"add_qkv_bias": False, "add_bias_linear": False}),
    ],
    ids=["qwen2.5-7b", "qwen3-4b", "glm4-9b", "glm4 without bias"],
)
def test_transformer_config(hf_config, expected):
    """The fields in which the families differ."""
    config = transformer_config(hf_config)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("rotary", [{}, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}])
def test_glm4_rotary_share(rotary):
    """Half of each head unless said otherwise, in either place."""
    hf_config = {key: value for key, value in GLM4_9B.items() if key != "partial_rotary_factor"} | rotary
    expected = {"rotary_base": 10000.0, "rotary_percent": 0.25 if rotary else 0.5}
    assert architecture_of(hf_config).model_fields(hf_config) == expected


def flags_of(hf_config: dict, **options) -> dict[str, list[str]]:
    """--flag -> its values."""
    found: dict[str, list[str]] = {}
    for item in pretrain_flags(hf_config, **options):
        if item.startswith("--"):
            assert item not in found
            values = found[item] = []
        else:
            values.append(item)
    return found


def test_flags_of_qwen25():
    """All of them, written out."""
    expected = """--transformer-impl transformer_engine --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944
        --num-attention-heads 28 --num-query-groups 4 --kv-channels 128 --normalization RMSNorm --norm-epsilon 1e-06
        --hidden-dropout 0.0 --attention-dropout 0.0 --init-method-std 0.02 --group-query-attention --swiglu
        --disable-bias-linear --add-qkv-bias --max-position-embeddings 32768 --position-embedding-type rope
        --rotary-base 1000000 --rotary-percent 1.0 --untie-embeddings-and-output-weights --vocab-size 152064
        --padded-vocab-size 152064 --make-vocab-size-divisible-by 128"""
    assert pretrain_flags(QWEN25_7B) == expected.split()


def test_flags_of_qwen3_4b():
    """Tied, norms on query and key, the vocabulary padded for the layout asked for."""
    flags = flags_of(QWEN3_4B, tensor_model_parallel_size=4)
    assert flags["--qk-layernorm"] == [] and flags["--padded-vocab-size"] == ["152064"]
    assert not flags.keys() & {"--untie-embeddings-and-output-weights", "--add-qkv-bias", "--spec", "--no-rope-fusion"}


@pytest.mark.parametrize(("impl", "name"), [("local", "LOCAL"), ("transformer_engine", "TE")])
def test_flags_of_glm4(impl, name):
    """Interleaved half rotary without the fused kernel, and the layer spec by name."""
    flags = flags_of(GLM4_9B, transformer_impl=impl)
    assert flags["--spec"] == ["eaft_megatron.models.glm4_spec", f"GLM4_LAYER_SPEC_{name}"]
    assert (flags["--rotary-percent"], flags["--rotary-base"]) == (["0.5"], ["10000"])
    assert flags.keys() > {"--rotary-interleaved", "--no-rope-fusion", "--add-qkv-bias"}
    assert "--add-qkv-bias" not in flags_of({**GLM4_9B, "attention_bias": False})


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 1000.5}, "rope_theta = 1000.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"'linear' \(factor 2.0\)"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, **_LLAMA3}}, "'llama3' with factor 32.0"),
    ],
)
def test_flags_that_pretrain_gpt_would_round_or_ignore_are_refused(changes, words):
    """Rather than training another model than the one converted."""
    with pytest.raises(ValueError, match=words):
        pretrain_flags({**QWEN25_7B, **changes})


def test_llama3_scaling_by_the_factor_megatron_has():
    """Llama 3.1's own."""
    flags = flags_of({**QWEN25_7B, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **_LLAMA3}})
    assert flags["--use-rope-scaling"] == [] and flags["--rope-scaling-factor"] == ["8.0"]


def test_megatron_finds_the_layer_spec_by_name():
    """As --spec looks it up, in a process of its own; Transformer Engine's, not installed, says what is missing."""
    code = """
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from eaft_megatron.models import glm4_spec

for name in ("LOCAL", "TE") if HAVE_TE else ("LOCAL",):
    spec = import_module(["eaft_megatron.models.glm4_spec", f"GLM4_LAYER_SPEC_{name}"])
    assert isinstance(spec, ModuleSpec) and spec.module is glm4_spec.SandwichNormLayer
if not HAVE_TE:
    try:
        glm4_spec.GLM4_LAYER_SPEC_TE
    except AttributeError as error:
        assert "Transformer Engine" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_only_glm4_has_the_sandwich_norms():
    """The other families keep megatron-core's own layer."""
    from eaft_megatron.models.glm4_spec import SandwichNormLayer

    layers = [layer_spec(config, transformer_config(config)).module for config in (QWEN25_7B, QWEN3_4B, GLM4_9B)]
    assert [layer is SandwichNormLayer for layer in layers] == [False, False, True]
