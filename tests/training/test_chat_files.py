"""`--data` takes every row that `prepare` takes, with the same labels: templates that split rows, calls, ShareGPT."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("datasets")

from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.data.samples import PreparedDataset
from eaft_megatron.testing import run_distributed
from eaft_megatron.training.arguments import parse_arguments
from eaft_megatron.training.datasets import read_datasets
from tests.data.template_tokenizers import template_tokenizer
from tests.training.tiny_run import arguments, metrics, train_in_process, write_model

SEQ_LENGTH = 1024
QUESTION, CALL = {"role": "user", "content": "q"}, {"name": "weather", "arguments": {"city": "Bonn"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLING = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "7 degrees"},
    {"role": "assistant", "content": "cold"},
]
WRITTEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>'
CASES = {  # name: (template, row, what is trained on in each of its samples)
    "qwen3 two turns": (
        "qwen3",
        {"messages": [QUESTION, {"role": "assistant", "content": "one"}] * 2},
        [["one<|im_end|>"], ["one<|im_end|>"]],
    ),
    "qwen3 tool call": ("qwen3", {"messages": CALLING, "tools": TOOLS}, [[WRITTEN_CALL], ["cold<|im_end|>"]]),
    "glm-4 tool call": (
        "glm-4-0414",
        {"messages": CALLING, "tools": TOOLS},
        [['weather \n{"city": "Bonn"}<|observation|>', "\ncold<|user|>"]],
    ),
    "sharegpt": (
        "qwen2.5-instruct",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [["a<|im_end|>"]],
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """For each case a model with its template's tokenizer, a file of two rows, and the folder that `prepare` makes."""
    root = tmp_path_factory.mktemp("chat-files")
    for name, (template, row, _) in CASES.items():
        folder = root / name
        write_model(folder / "model", template_tokenizer(template))
        (folder / "train.jsonl").write_text(2 * f"{json.dumps(row)}\n")
        (folder / "held_out.jsonl").write_text(json.dumps(row))
        options = PrepareOptions(SEQ_LENGTH, pack=False)
        prepare([str(folder / "train.jsonl")], str(folder / "model"), folder / "prepared", options)
    return root


def _flags(folder, run: str, *data: str) -> list[str]:
    flags = arguments(folder, run, "--seq-length", str(SEQ_LENGTH), "--train-iters", "1", "--global-batch-size", "2")
    at = flags.index("--data")
    return [*flags[:at], *flags[at + 2 :], *data]


@pytest.fixture(scope="module")
def runs(inputs):
    """A step on each file, and on each folder, one after another in one process."""
    argvs = []
    for name in CASES:
        folder = inputs / name
        argvs += [_flags(folder, "file", "--data", str(folder / "train.jsonl"))]
        argvs += [_flags(folder, "folder", "--sft-data", str(folder / "prepared"))]
    run_distributed(_train_each, 1, argvs)
    return inputs


def _train_each(argvs: list[list[str]]) -> None:
    for argv in argvs:
        train_in_process(argv)


def _trained(tokenizer, sample) -> list[str]:
    """The decoded runs of labels that count."""
    runs: list[list[int]] = []
    before = False
    for label, counts in zip(sample["labels"].tolist(), sample["loss_mask"].tolist(), strict=True):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(label)
        before = bool(counts)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", CASES)
def test_the_labels_are_those_of_prepare(inputs, name):
    """Tokens, labels and mask equal the folder's, and what is trained on is what is written out above."""
    template, _, expected = CASES[name]
    folder = inputs / name
    args = parse_arguments(_flags(folder, "file", "--data", str(folder / "train.jsonl")), world_size=1)
    args.true_vocab_size = 10_000
    actual = read_datasets(args)[None]
    prepared = PreparedDataset(PreparedData(folder / "prepared"), SEQ_LENGTH, packed=False)
    assert len(actual) == len(prepared) == 2 * len(expected)
    for index in range(len(prepared)):
        for key in ("labels", "loss_mask", "tokens", "position_ids"):
            end = prepared.sample_length(index)
            assert torch.equal(actual[index][key][:end], prepared[index][key][:end]), key
        assert actual[index]["loss_mask"].sum() == prepared[index]["loss_mask"].sum()
    tokenizer = template_tokenizer(template)
    assert [_trained(tokenizer, actual[index]) for index in range(len(expected))] == expected


@pytest.mark.parametrize("name", CASES)
def test_train_takes_the_rows(runs, name):
    """A step on the file is a step on the folder: the same loss over the same number of tokens, and an evaluation."""
    [actual], [expected] = metrics(runs / name, "file"), metrics(runs / name, "folder")
    for key in ("lm loss", "eaft loss", "tokens", "grad norm"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-6)
    assert actual["tokens"] > 0
    evaluation = metrics(runs / name, "file", evaluation=True)
    assert [row["eval"] for row in evaluation] == ["target", "target"]


def test_a_file_is_not_packed(inputs, capsys):
    """--sft-packing mask with --data names the way to packed samples."""
    from eaft_megatron.train import main

    folder = inputs / "sharegpt"
    argv = _flags(folder, "wrong", "--data", str(folder / "train.jsonl"), "--sft-packing", "mask")
    assert main(argv) == 1
    assert "--sft-packing mask is for prepared folders: `eaft-megatron prepare`" in capsys.readouterr().err
