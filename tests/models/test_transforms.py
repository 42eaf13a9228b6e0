"""The weight transforms against layouts written out by hand, and there and back for many sizes."""

from __future__ import annotations

import pytest
import torch

from eaft_megatron.models.architecture import find_entry
from eaft_megatron.models.llama import LLAMA
from eaft_megatron.models.transforms import FUSED_GATE_UP, GATE_UP, QKV_ROWS, REPLICATED, ROW, VOCAB, ModelSizes


def sizes(**changes) -> ModelSizes:
    values = {"hidden": 3, "ffn": 4, "heads": 4, "kv_groups": 2, "head_dim": 1, "vocab": 5, "padded_vocab": 8}
    return ModelSizes(**{**values, **changes})


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


@pytest.mark.parametrize(
    ("kind", "tensors", "expected"),
    [
        # per KV group its query heads, its key, its value
        (QKV_ROWS, [column(0, 1, 2, 3), column(10, 11), column(20, 21)], [[0, 1, 10, 20], [2, 3, 11, 21]]),
        # each rank: its part of gate, then its part of up
        (GATE_UP, [column(0, 1, 2, 3), column(10, 11, 12, 13)], [[0, 1, 10, 11], [2, 3, 12, 13]]),
        # the same from one tensor
        (FUSED_GATE_UP, [column(0, 1, 2, 3, 10, 11, 12, 13)], [[0, 1, 10, 11], [2, 3, 12, 13]]),
        # five rows padded with zeros to eight
        (VOCAB, [column(1, 2, 3, 4, 5)], [[1, 2, 3, 4], [5, 0, 0, 0]]),
        (ROW, [column(1, 2, 3, 4).T], [[1, 2], [3, 4]]),
        (REPLICATED, [column(1, 2)], [[1, 2], [1, 2]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layout_over_two_ranks(kind, tensors, expected):
    """What each of two ranks holds, and that the Hugging Face tensors come back from it."""
    shards = [kind.to_megatron(tensors, rank, 2, sizes()) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == expected
    for tensor, back in zip(tensors, kind.to_hf(shards, sizes()), strict=True):
        assert torch.equal(back, tensor)


def test_four_ranks_share_two_kv_groups():
    """With more ranks than groups the interleaved rows are cut evenly, in the middle of a group."""
    tensors = [column(0, 1, 2, 3), column(10, 11), column(20, 21)]
    shards = [QKV_ROWS.to_megatron(tensors, rank, 4, sizes()) for rank in range(4)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1], [10, 20], [2, 3], [11, 21]]


@pytest.mark.parametrize(("vocab", "padded", "tp"), [(5, 8, 4), (4, 8, 2), (8, 8, 2), (1, 4, 4), (257, 512, 2)])
def test_vocabulary_padding(vocab, padded, tp):
    """Zero rows after the true ones, also on a rank that holds nothing else; gone on the way back."""
    size = sizes(vocab=vocab, padded_vocab=padded)
    rows = torch.randn(vocab, 3)
    shards = [VOCAB.to_megatron([rows], rank, tp, size) for rank in range(tp)]
    assert torch.equal(torch.cat(shards), torch.cat([rows, torch.zeros(padded - vocab, 3)]))
    assert torch.equal(VOCAB.to_hf(shards, size)[0], rows)


@pytest.mark.parametrize(("heads", "groups", "tp"), [(9, 3, 1), (9, 3, 3), (9, 3, 9), (8, 8, 4), (8, 1, 8), (12, 2, 6)])
@pytest.mark.parametrize("width", [(), (7,)], ids=["bias", "weight"])
def test_query_key_value_there_and_back(heads, groups, tp, width):
    """Any grouping, biases included."""
    size = sizes(heads=heads, kv_groups=groups, head_dim=72)
    tensors = [torch.randn(rows, *width) for rows in (size.query, size.key_value, size.key_value)]
    shards = [QKV_ROWS.to_megatron(tensors, rank, tp, size) for rank in range(tp)]
    assert len({shard.shape for shard in shards}) == 1
    for tensor, back in zip(tensors, QKV_ROWS.to_hf(shards, size), strict=True):
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_the_table_knows_both_layer_specs(spec):
    """Transformer Engine keeps a norm's weight in the linear layer that follows it."""
    norms = {
        "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
        "transformer_engine": (
            "self_attention.linear_qkv.layer_norm_weight",
            "mlp.linear_fc1.layer_norm_weight",
        ),
    }[spec]
    found = [find_entry(LLAMA.entries, f"decoder.layers.11.{name}").names(11) for name in norms]
    assert found == [["model.layers.11.input_layernorm.weight"], ["model.layers.11.post_attention_layernorm.weight"]]


def test_a_parameter_without_an_entry_is_an_error():
    """Rather than staying what it was."""
    with pytest.raises(ValueError, match=r"decoder.layers.0.mlp.router.weight .* weight table does not know"):
        find_entry(LLAMA.entries, "decoder.layers.0.mlp.router.weight")
