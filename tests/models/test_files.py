"""What can be wrong with a folder, on the way in and on the way out; one process, no training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from eaft_megatron.models import (
    build_model,
    hf_writer,
    load_hf_weights,
    read_hf_config,
    save_hf_weights,
    transformer_config,
)
from eaft_megatron.models import save as save_module
from tests.models.ranks import layout
from tests.models.tiny import VOCAB, save, tiny_llama

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tiny_llama("untied"), tmp_path_factory.mktemp("hf") / "source")


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """megatron-core in this process, alone in its world."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with layout():
            yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def folder(source, tmp_path):
    """A copy to damage: one file instead of shards."""
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    target = tmp_path / "model"
    target.mkdir()
    shutil.copy(source / "config.json", target)
    save_file(tensors, target / "model.safetensors")
    return target


def fresh_model(folder, **changes):
    hf_config = {**read_hf_config(folder), **changes}
    return build_model(hf_config, transformer_config(hf_config))


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, words: str, model=None) -> None:
    """ValueError with these words, and not one parameter filled."""
    model = model or fresh_model(folder)
    with pytest.raises(ValueError, match=words):
        load_hf_weights(model, folder)
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_a_model_nobody_loaded_is_nan_and_a_loaded_one_is_not(megatron, folder):
    """No random initialisation that would pass for weights; afterwards every parameter holds numbers."""
    model = fresh_model(folder)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    load_hf_weights(_Wrapper(_Wrapper(model)), folder)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.embedding.word_embeddings.weight[VOCAB:].any()


def test_parameters_are_marked_as_an_initialised_model_marks_them(megatron, folder):
    """The gradient norm, among others, counts a split parameter on every rank and any other on one rank only."""
    hf_config = read_hf_config(folder)
    initialised = build_model(hf_config, transformer_config(hf_config, perform_initialization=True))
    split = 0
    for (name, expected), actual in zip(initialised.named_parameters(), fresh_model(folder).parameters(), strict=True):
        assert getattr(actual, "tensor_model_parallel", False) == getattr(expected, "tensor_model_parallel", False)
        assert getattr(actual, "partition_dim", -1) == getattr(expected, "partition_dim", -1), name
        if "linear_fc1" in name:  # two tensors, one after the other; megatron-core says so since 0.16
            assert actual.partition_stride == 2
        else:
            assert getattr(actual, "partition_stride", 1) == getattr(expected, "partition_stride", 1), name
        split += getattr(actual, "tensor_model_parallel", False)
    assert split == 2 + 4 * 4  # two vocabularies, four linear layers in each of four blocks


class _Wrapper(torch.nn.Module):
    """As DDP and Float16Module hold their model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_missing_tensor(megatron, folder):
    """Named, with the file it should be in."""
    rewrite(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, f"tensor {NORM} is missing from .*model.safetensors")


def test_unused_tensor(megatron, folder):
    """A bias nobody would have loaded."""
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}))
    refused(folder, "tensor model.layers.0.self_attn.q_proj.bias in .*model.safetensors has no place")


def test_rotary_buffers_of_old_checkpoints_are_let_through(megatron, folder):
    """They are computed, and transformers ignores them too."""
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_hf_weights(fresh_model(folder), folder)


def test_wrong_shape(megatron, folder):
    """Named, with both shapes."""
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(65)}))
    refused(folder, rf"tensor {NORM} in .*model.safetensors has shape \[65\], the model needs \[64\]")


def test_quantised_tensor(megatron, folder):
    """Integers are not weights."""
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)}))
    refused(folder, f"tensor {NORM} .* dtype I8")


def test_truncated_file(megatron, folder):
    """A download that stopped half-way."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "model.safetensors is not a complete safetensors file")


def test_missing_shard_and_missing_weights(megatron, source, folder, tmp_path):
    """An index that names a file that is not there; no safetensors at all; an index that is wrong."""
    copy = tmp_path / "sharded"
    shutil.copytree(source, copy)
    next(copy.glob("model-00002-*")).unlink()
    refused(copy, "model-00002-of-.* is missing", fresh_model(folder))
    for path in copy.glob("model*"):
        path.unlink()
    refused(copy, "only safetensors are read", fresh_model(folder))
    shutil.copy(folder / "model.safetensors", copy / "a.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "nobody.weight": "a.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "nobody.weight is in a.safetensors, but it is not there", fresh_model(folder))


def test_models_that_do_not_fit_the_folder(megatron, folder):
    """Another depth, another vocabulary, tied instead of untied."""
    refused(folder, r"layers.3.* has no place", fresh_model(folder, num_hidden_layers=3))
    refused(folder, "vocab_size 257 exceeds", fresh_model(folder, vocab_size=100))
    refused(folder, "tie_word_embeddings is False", fresh_model(folder, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="GPTModel"):
        load_hf_weights(torch.nn.Linear(1, 1), folder)


def test_tied_model_with_an_output_layer_in_the_file(megatron, folder):
    """Which of the two weights would be meant? The message says how to decide."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refused(folder, "lm_head.weight .*tie_word_embeddings")


@pytest.fixture
def model(megatron, source):
    loaded = fresh_model(source)
    load_hf_weights(loaded, source)
    return loaded


def test_export_refuses_a_folder_that_holds_something(model, source, tmp_path):
    """An empty folder is fine."""
    output = tmp_path / "out"
    output.mkdir()
    save_hf_weights(model, source, output)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_hf_weights(model, source, output)


def test_export_in_another_dtype(model, source, tmp_path):
    """Every tensor in it, config.json in both spellings; a dtype nobody loads is refused."""
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_hf_weights(model, tmp_path / "config", tmp_path / "out", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["torch_dtype"], written["dtype"]) == ("bfloat16", "bfloat16")
    with pytest.raises(ValueError, match=r"dtype torch.int8: use torch.float32"):
        save_hf_weights(model, source, tmp_path / "other", dtype=torch.int8)


def test_export_refuses_the_configuration_of_another_model(model, source, tmp_path):
    """Otherwise a folder would be written that no one can load."""
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ValueError, match="another model: .* 5 layers"):
        save_hf_weights(model, tmp_path, tmp_path / "out")


class Killed(BaseException):
    """Stands for the process ending on the spot: nothing of ours handles it."""


@pytest.mark.parametrize("step", ["finish_shards", "carry_files", "write_config", "rename"])
def test_an_interrupted_export_never_looks_whole(model, source, tmp_path, monkeypatch, step):
    """Wherever it stops, output_dir is not there, and what is left is hidden and, until complete, not a model."""

    def killed(*_):
        raise Killed

    monkeypatch.setattr(*((save_module.os, "rename") if step == "rename" else (save_module, step)), killed)
    with pytest.raises(Killed):
        save_hf_weights(model, source, tmp_path / "out")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.incomplete-")
    if step != "rename":
        with pytest.raises(ValueError, match="no config.json"):
            read_hf_config(left)
    save_hf_weights(model, source, tmp_path / "out")  # leftovers are not in the way of the next attempt


def test_shards_of_limited_size(model, source, tmp_path, monkeypatch):
    """A stage larger than a shard is split, and the index finds everything."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_writer, "_SHARD_BYTES", 100_000)
    save_hf_weights(model, source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(4 * parameter.numel() for parameter in again.parameters())
    assert torch.equal(again.model.embed_tokens.weight, model.embedding.word_embeddings.weight[:VOCAB])
