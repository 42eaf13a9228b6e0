"""Reading config.json, and refusing early what would go wrong late."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from eaft_megatron.megatron_map import kv_groups_can_be_shared
from eaft_megatron.models import layer_spec, padded_vocab_size, read_hf_config, transformer_config

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "rope_interleaved": False,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def test_importing_needs_torch_alone():
    """The package can be imported where megatron-core, safetensors and transformers are not wanted."""
    code = (
        "import sys, eaft_megatron.models\n"
        "print([n for n in ('megatron', 'safetensors', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reads_config_as_it_stands(tmp_path):
    """The dictionary of the file, nothing added."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert read_hf_config(tmp_path) == SMOLLM2


def test_missing_and_damaged_files(tmp_path):
    """Each says what is wrong and where."""
    with pytest.raises(ValueError, match="is not a folder"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_hf_config(tmp_path)


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM; known here: .*LlamaForCausalLM"),
        ({"architectures": None}, "missing; known here"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters = 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}}, "8192"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "low_freq_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = 'awq'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"hidden_size": 577}, "must divide hidden_size = 577"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_values_we_cannot_honour_are_refused(tmp_path, changes, words):
    """The message names the field."""
    (tmp_path / "config.json").write_text(json.dumps({**SMOLLM2, **changes}))
    with pytest.raises(ValueError, match=words):
        read_hf_config(tmp_path)


def test_transformer_config_of_smollm2():
    """The fields that decide what is computed, and overrides winning over them."""
    config = transformer_config(SMOLLM2, tensor_model_parallel_size=3, params_dtype=torch.bfloat16, hidden_dropout=0.25)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (9, 3, 64)
    assert (config.normalization, config.layernorm_epsilon) == ("RMSNorm", 1e-5)
    assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    assert not config.add_bias_linear and not config.perform_initialization
    assert config.bf16 and config.params_dtype is config.pipeline_dtype is torch.bfloat16
    assert (config.hidden_dropout, config.attention_dropout) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2: 9 attention heads .* use 1 or 3"),
        ({"tensor_model_parallel_size": 9}, "intermediate_size 1536 does not divide by 9: use 1 or 3"),
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size 0"),
        (
            {"pipeline_model_parallel_size": 4},
            "--pipeline-model-parallel-size 4: 30 layers .* use 1, 2, 3, 5, 6, 10, 15",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "15 layers per pipeline stage .* use 1, 3, 5 or 15",
        ),
    ],
)
def test_parallel_sizes_that_do_not_fit(arguments, words):
    """The message names the flag and the sizes that do fit."""
    with pytest.raises(ValueError, match=words):
        transformer_config(SMOLLM2, **arguments)


def test_kv_groups_that_cannot_be_shared():
    """Twelve heads in three groups: two ranks can neither split nor share three groups; six can share them."""
    hf_config = {**SMOLLM2, "num_attention_heads": 12, "hidden_size": 768}
    fitting = "1, 3, 6 or 12" if kv_groups_can_be_shared() else "1 or 3"
    with pytest.raises(ValueError, match=f"3 KV heads .* use {fitting}$"):
        transformer_config(hf_config, tensor_model_parallel_size=2)
    if kv_groups_can_be_shared():
        assert transformer_config(hf_config, tensor_model_parallel_size=6).num_query_groups == 3


def test_uneven_pipelines_are_left_to_megatron():
    """Thirty layers over four stages fit when the first and last stage are given sizes of their own."""
    config = transformer_config(
        SMOLLM2,
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=7,
        num_layers_in_last_pipeline_stage=7,
    )
    assert config.num_layers == 30


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((50257, 1), 50304), ((50257, 8), 51200), ((49152, 3), 49152), ((257, 2, 1), 258), ((151936, 2), 152064)],
)
def test_padded_vocab_size(arguments, expected):
    """Megatron's rule; GPT-2's 50304 and 51200 are its well-known results."""
    assert padded_vocab_size(*arguments) == expected


def test_layer_spec_refusals():
    """An unknown implementation, and Transformer Engine where it is not installed, with the way out."""
    from megatron.core.models.gpt import gpt_layer_specs

    config = transformer_config(SMOLLM2)
    with pytest.raises(ValueError, match="--transformer-impl te: use local or transformer_engine"):
        layer_spec(SMOLLM2, config, "te")
    if not gpt_layer_specs.HAVE_TE:
        with pytest.raises(ValueError, match="install it .* or use --transformer-impl local"):
            layer_spec(SMOLLM2, config, "transformer_engine")
    with pytest.raises(ValueError, match="--context-parallel-size"):
        layer_spec(SMOLLM2, transformer_config(SMOLLM2, context_parallel_size=2))
