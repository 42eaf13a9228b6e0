"""HybridModel's checkpoints under GPTModel's names, and the pattern that the flags give."""

from __future__ import annotations

import pytest

from eaft_megatron.models.hybrid_names import gpt_names, layer_pattern


def test_a_hybrid_stack_under_the_names_of_gpt():
    """Attention and MLP of a block are a layer each; numbers of two digits sort as numbers."""
    keys = ["embedding.word_embeddings.weight", "decoder.final_norm.weight", "optimizer.state.exp_avg.x"]
    for block in range(6):
        keys += [f"decoder.layers.{2 * block}.self_attention.linear_qkv.weight"]
        keys += [f"decoder.layers.{2 * block}.post_self_attn_layernorm.weight"]
        keys += [f"decoder.layers.{2 * block + 1}.mlp.linear_fc1.weight"]
    expected = {"decoder.final_layernorm.weight": "decoder.final_norm.weight"}
    expected |= {key: key for key in keys if "layers" not in key and "final" not in key}
    for block in range(6):
        for name, layer in (
            ("self_attention.linear_qkv.weight", 2 * block),
            ("post_self_attn_layernorm.weight", 2 * block),
            ("mlp.linear_fc1.weight", 2 * block + 1),
        ):
            expected[f"decoder.layers.{block}.{name}"] = f"decoder.layers.{layer}.{name}"
    assert gpt_names(keys) == expected


def test_gpt_checkpoints_keep_their_names():
    """Stacked or not, nothing is renamed."""
    keys = ["decoder.layers.self_attention.linear_qkv.weight", "decoder.final_layernorm.weight"]
    assert gpt_names(keys) == {key: key for key in keys}


def test_other_stacks_are_refused():
    """A Mamba layer has no place in a Hugging Face model that is known here."""
    keys = ["decoder.final_norm.weight", "decoder.layers.0.mixer.in_proj.weight", "decoder.layers.1.mlp.x"]
    with pytest.raises(ValueError, match="layer 0 of this HybridModel is no attention layer"):
        gpt_names(keys)


@pytest.mark.parametrize(
    "layers, stages, expected",
    [(2, 1, "*-*-"), (4, 2, "*-*-|*-*-"), (5, 2, "*-*-|*-*-*-"), (3, 3, "*-|*-|*-")],
)
def test_patterns(layers, stages, expected):
    """Every block is attention and MLP; stages are of nearly equal length."""
    assert layer_pattern(layers, stages) == expected


def test_a_stage_without_a_layer_is_refused():
    """Megatron would build an empty stage."""
    with pytest.raises(ValueError, match="--pipeline-model-parallel-size 3: the model has 2 layers"):
        layer_pattern(2, 3)
