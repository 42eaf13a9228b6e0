"""Converted models in Megatron-LM's own pretrain_gpt.py, with the flags that come with them. Needs a clone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eaft_megatron.models.convert import convert_to_hf, convert_to_megatron
from tests.hooks import megatron_script
from tests.models.tiny import VOCAB, assert_same_tensors, save, tiny_family, tiny_llama

PERIOD = 32  # MODEL's sequence length: every sample holds the same tokens, wherever the shuffling takes it from
pytestmark = [pytest.mark.slow, *megatron_script.needs_clone]
CASES = {"untied": (tiny_llama, {"tp": 2}), "glm4_bias": (tiny_family, {"pp": 2})}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[PERIOD]"""
    return torch.randint(VOCAB - 1, (PERIOD,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def data(tokens, tmp_path_factory) -> str:
    """Prefix of an indexed dataset: the same tokens again and again."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(40):
        builder.add_document(tokens.repeat(10), [10 * PERIOD])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("tag", megatron_script.TAGS)
@pytest.mark.parametrize("name", CASES)
def test_pretrain_gpt_loads_it(tokens, data, tmp_path, tmp_path_factory, monkeypatch, name, tag):
    """--load DIR --finetune and the recorded flags: transformers' loss in the first step, and what the run saves
    after a step at learning rate 0 is the same Hugging Face model again."""
    make, layout = CASES[name]
    model = make(name)
    source = save(model, tmp_path / "hf")
    record = convert_to_megatron(source, tmp_path / "megatron", transformer_impl="local")
    script = megatron_script.checkout(megatron_script.CLONE, tag, tmp_path_factory.getbasetemp() / "releases")
    monkeypatch.setattr(megatron_script, "MODEL", [flag for flag in megatron_script.MODEL if flag != "--mock-data"])
    flags = [*record["pretrain_gpt_flags"], "--load", str(tmp_path / "megatron"), "--finetune"]
    flags += ["--exit-on-missing-checkpoint", "--data-path", data, "--train-iters", "1", "--lr", "0"]
    flags += ["--save", str(tmp_path / "saved"), "--save-interval", "1"]
    flags += ["--loss-type", "eaft", "--true-vocab-size", str(record["true_vocab_size"])]
    (row,) = megatron_script.reported(megatron_script.run(script, flags, **layout, processes=2))
    ids = torch.cat([tokens, tokens[:1]])
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item()
    assert float(row["lm loss"]) == pytest.approx(expected, rel=1e-5)
    convert_to_hf(tmp_path / "saved", tmp_path / "back", hf_config_dir=source, check=True)
    assert_same_tensors(tmp_path / "back", source)
