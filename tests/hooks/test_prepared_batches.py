"""How rows are kept apart in Megatron-LM: chosen from its flags and release, refused where they would not be."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("datasets")

from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.hooks.prepared_batches import PreparedBatches, choose_layout
from tests.data.conftest import build_tokenizer
from tests.data.conversations import chats, write


def _args(**given) -> argparse.Namespace:
    defaults = dict(
        sft=False,
        sft_packing="auto",
        transformer_impl="transformer_engine",
        create_attention_mask_in_dataloader=True,
        micro_batch_size=1,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        dataloader_type="single",
        seq_length=512,
        seed=1,
        global_batch_size=2,
        true_vocab_size=None,
        sft_eval_sets={},
    )
    return argparse.Namespace(**{**defaults, **given})


LOCAL = dict(transformer_impl="local")
THD = dict(sft=True, create_attention_mask_in_dataloader=False)


@pytest.mark.parametrize(
    "given, packing, version, expected",
    [
        (LOCAL, True, (0, 12), "packed, kept apart by an attention mask"),
        (LOCAL, False, (0, 12), "one row each, padded"),
        ({**LOCAL, "sft_packing": "none"}, True, (0, 19), "one row each, padded"),
        ({}, False, (0, 12), "one row each, padded"),
        ({"sft_packing": "none"}, True, (0, 12), "one row each, padded"),
        (THD, True, (0, 17), "packed, THD"),
        (THD, False, (0, 19), "one row each, THD"),
        ({**THD, "sft_packing": "none"}, True, (0, 19), "one row each, THD"),
        ({**THD, "context_parallel_size": 2}, True, (0, 18), "packed, THD"),
        ({**THD, "micro_batch_size": 4}, True, (0, 19), "packed, THD"),
    ],
)
def test_layouts(given, packing, version, expected):
    """What is chosen without a word from the user, or with one."""
    assert choose_layout(_args(**given), packing, version).text == expected


@pytest.mark.parametrize(
    "given, version, message",
    [
        ({}, (0, 19), "needs --sft and --no-create-attention-mask-in-dataloader"),
        ({}, (0, 15), "needs --sft of Megatron-LM 0.17 or later"),
        (THD, (0, 16), "needs --sft of Megatron-LM 0.17 or later"),
        ({"sft_packing": "mask"}, (0, 19), "needs --transformer-impl local"),
        ({**LOCAL, "sft": True}, (0, 19), "--transformer-impl local refuses"),
        ({**LOCAL, "sft_packing": "thd"}, (0, 19), "--transformer-impl local refuses"),
        ({**LOCAL, "create_attention_mask_in_dataloader": False}, (0, 19), "remove --no-create-attention-mask"),
        ({"sft": True}, (0, 19), "give --no-create-attention-mask-in-dataloader"),
        ({**THD, "micro_batch_size": 2}, (0, 18), "--micro-batch-size must be 1"),
        ({**THD, "context_parallel_size": 2}, (0, 17), "needs Megatron-LM 0.18"),
        ({**THD, "pipeline_model_parallel_size": 2}, (0, 17), "does not tell every rank where the rows of a pack end"),
        ({**THD, "sft_packing": "mask"}, (0, 19), "does not go with --sft"),
    ],
)
def test_refusals(given, version, message):
    """Wherever attention would look across rows, or the release cannot do it."""
    with pytest.raises(ValueError, match=message):
        choose_layout(_args(**given), True, version)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty conversations, rows padded to multiples of 4, a tenth set aside."""
    folder = tmp_path_factory.mktemp("layout")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    options = PrepareOptions(512, pad_to_multiple_of=4, valid_fraction=0.2)
    prepare([write(folder / "a.jsonl", chats(40))], str(folder / "tokenizer"), folder / "out", options)
    return folder / "out"


def test_thd_samples_hold_their_boundaries(folder):
    """int32, from 0 to seq_length; padded to one length from 0.19 on, so that samples can be stacked."""
    for version in ((0, 18), (0, 19)):
        data = PreparedBatches(_args(sft_data=str(folder), **THD), version=version)
        samples = data.training_dataset(4)
        for index in range(4):
            bounds, longest = samples[index]["cu_seqlens"], samples[index]["max_seqlen"]
            assert bounds.dtype == longest.dtype == torch.int32 and (bounds[0], bounds[-1]) == (0, 512)
            assert longest == (bounds[1:] - bounds[:-1]).max()
            assert len(bounds) == 513 if version == (0, 19) else bool((bounds[1:] > bounds[:-1]).all())
            starts = bounds[:-1][bounds[:-1] < 512].long()
            assert (samples[index]["position_ids"][starts] == 0).all()
        assert set(samples[0]) == {"tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen"}


def test_every_epoch_has_every_sample_in_another_order(folder):
    """Three epochs of the training set: each a permutation, no two alike; the same for the same seed."""
    data = PreparedBatches(_args(sft_data=str(folder), **LOCAL), version=(0, 16))
    size = len(data.train)
    samples = data.training_dataset(3 * size)
    tokens = [tuple(samples[index]["tokens"].tolist()) for index in range(3 * size)]
    epochs = [tokens[begin : begin + size] for begin in range(0, 3 * size, size)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 and len({tuple(epoch) for epoch in epochs}) == 3
    again = PreparedBatches(_args(sft_data=str(folder), **LOCAL), version=(0, 16)).training_dataset(3 * size)
    assert tokens[size] == tuple(again[size]["tokens"].tolist())


def test_an_evaluation_set_counts_each_sample_once(folder):
    """In order, then filled up to whole batches with samples that do not count."""
    data = PreparedBatches(_args(sft_data=str(folder), **LOCAL), version=(0, 16))
    assert list(data.evaluation) == ["valid"]
    samples, dataset = data.evaluation_dataset("valid", 8), data.evaluation["valid"]
    assert len(samples) % 8 == 0 and len(samples) - len(dataset) < 8
    trained = [float(samples[index]["loss_mask"].sum()) for index in range(len(samples))]
    assert trained[: len(dataset)] == [float(dataset[index]["loss_mask"].sum()) for index in range(len(dataset))]
    assert set(trained[len(dataset) :]) <= {0.0}


def test_context_parallelism_needs_rows_it_can_cut(folder):
    """Rows padded to 4 serve CP 2, not CP 4; the error has the command that helps."""
    PreparedBatches(_args(sft_data=str(folder), context_parallel_size=2, **THD), version=(0, 19))
    with pytest.raises(ValueError, match="--repack .* --pad-to-multiple-of 8"):
        PreparedBatches(_args(sft_data=str(folder), context_parallel_size=4, **THD), version=(0, 19))
