"""A file prepared in memory: the rows of the folder that `prepare` writes, as samples; errors with file and line."""

import json
import re

import pytest

pytest.importorskip("datasets")

import torch

from eaft_megatron.data import collate
from eaft_megatron.data.prepare import prepare, prepare_in_memory
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.data.samples import PreparedDataset


def chat(question: str, answer: str) -> dict:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages}


CHAT_OVERHEAD = 32  # tokens of chat("", "") with the tests' tokenizer: one per byte or special token


@pytest.fixture
def write(tmp_path):
    def _write(*rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return _write


def samples(path, tokenizer, seq_length) -> PreparedDataset:
    data = prepare_in_memory(path, tokenizer, PrepareOptions(seq_length, pack=False))
    return PreparedDataset(data, seq_length, packed=False, pad_token_id=tokenizer.pad_token_id)


def test_sample_is_shifted_masked_and_padded(write, tokenizer):
    """Labels are the next tokens; the mask covers the answer and its end token, and no padding of the same id."""
    data = samples(write(chat("q", "ab")), tokenizer, 64)
    sample = data[0]
    expected_types = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32}
    assert {key: value.dtype for key, value in sample.items()} == {**expected_types, "position_ids": torch.int64}
    assert all(value.shape == (64,) for value in sample.values())
    length = data.sample_length(0)
    assert length == CHAT_OVERHEAD + 3 - 1
    assert torch.equal(sample["labels"][: length - 1], sample["tokens"][1:length])
    assert torch.equal(sample["position_ids"][:length], torch.arange(length))
    assert tokenizer.decode(sample["labels"][sample["loss_mask"] == 1]) == "ab<|im_end|>"
    assert sample["loss_mask"].sum() == 3
    assert (sample["tokens"][length:] == tokenizer.pad_token_id).all()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert not sample["loss_mask"][length:].any()


def test_text_rows_train_everything(write, tokenizer):
    """A text of n tokens has n - 1 labels."""
    sample = samples(write({"text": "abcd"}), tokenizer, 8)[0]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert tokenizer.decode(sample["labels"][:3]) == "bcd"


def test_truncated_and_dropped_rows_are_counted(write, tokenizer):
    """At seq_length s, s + 1 tokens fit; a longer row is cut; one cut before its answer is dropped."""
    fits = CHAT_OVERHEAD + 10
    rows = [chat("q" * 5, "a" * 5), chat("q" * 5, "a" * 6), chat("q" * 60, "a"), {"text": "x"}, {"text": ""}]
    data = samples(write(*rows), tokenizer, fits - 1)
    assert (len(data), data.truncated, data.dropped) == (2, 2, 3)
    assert [data.sample_length(i) for i in range(2)] == [fits - 1, fits - 1]
    # What is cut is the newline behind the end token.
    assert tokenizer.decode(data[1]["labels"][data[1]["loss_mask"] == 1]) == "a" * 6 + "<|im_end|>"


def test_a_label_that_nothing_predicts_does_not_count(write, tokenizer):
    """A row whose only trained token would be its first has no loss: dropped."""
    data = samples(write({"text": "a"}, {"text": "ab"}), tokenizer, 8)
    assert (len(data), data.dropped, data[0]["loss_mask"].sum()) == (1, 1, 1)


def test_it_is_the_folder_that_prepare_writes(write, tokenizer, tmp_path):
    """The same rows, masks, sources and manifest, but for the files; it survives being pickled for a loader."""
    import pickle

    path = write(*(chat("q" * n, "a" * (1 + 7 * n % 5)) for n in range(300)), {"text": "abc"}, chat("q" * 90, "a"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = PrepareOptions(64, pack=False)
    prepare([str(path)], str(tmp_path / "tokenizer"), tmp_path / "out", options)
    expected = PreparedData(tmp_path / "out")
    actual = pickle.loads(pickle.dumps(prepare_in_memory(path, tokenizer, options)))
    assert len(actual) == len(expected) < 300
    assert actual.lengths.tolist() == expected.lengths.tolist()
    for row in range(len(expected)):
        for value, truth in zip(actual[row], expected[row], strict=True):
            assert value.tolist() == truth.tolist() if hasattr(truth, "tolist") else value == truth
    for key in expected.manifest.keys() - {"files", "tokenizer"}:
        assert actual.manifest[key] == expected.manifest[key], key
    assert actual.manifest["tokenizer"]["sha256"] == expected.manifest["tokenizer"]["sha256"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((chat("q", "a"), '{"messages": ['), ":2: broken JSON"),
        (({"prompt": "x", "answer": ""},), ":1: no known layout in the columns ['answer', 'prompt']"),
        (({"text": 3},), ":1: 'text' must be a string, found int"),
        (({"messages": [{"role": "user"}]},), ":1: turn 0 (user): no content"),
        (({"messages": [{"role": "user", "content": "q"}]},), ":1: no assistant turn that answers something"),
        (({**chat("q", "a"), "tools": "f"},), ":1: the tools column: not JSON"),
        (({"text": "x"},), ": no row of the train part has a token to train on within 65 tokens"),
    ],
)
def test_errors_name_file_and_line(write, tokenizer, rows, message):
    """Each bad row is a ValueError with its place."""
    path = write(*rows)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        samples(path, tokenizer, 64)


def test_missing_file_and_bad_length(tmp_path, write, tokenizer):
    """No file; a sequence length of 0."""
    with pytest.raises(FileNotFoundError, match="no such file"):
        samples(tmp_path / "none.jsonl", tokenizer, 64)
    with pytest.raises(ValueError, match="--seq-length 0 must be a positive multiple"):
        samples(write({"text": "ab"}), tokenizer, 0)


def test_collate_pads_to_the_longest_sample(write, tokenizer):
    """padded_length rounds up and stops at seq_length; collate trims to it and loses nothing."""
    data = samples(write({"text": "abcd"}, {"text": "abcdefgh"}), tokenizer, 10)
    assert [data.padded_length([0, 1]), data.padded_length([0], 4), data.padded_length([0, 1], 8)] == [7, 4, 8]
    assert data.padded_length([0, 1], 16) == 10
    batch = collate([data[0], data[1]], data.padded_length([0, 1]))
    assert all(value.shape == (2, 7) for value in batch.values())
    assert batch["loss_mask"].sum() == 10
    uncut = collate([data[0], data[1]])
    assert all(torch.equal(uncut[key][:, :7], batch[key]) for key in batch)
    with pytest.raises(ValueError, match="length 6 cuts off tokens"):
        collate([data[0], data[1]], 6)
    with pytest.raises(ValueError, match=r"outside 1\.\.10"):
        collate([data[0]], 11)
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
