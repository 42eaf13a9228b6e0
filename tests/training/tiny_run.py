"""A tiny Llama with a tokenizer and chat data, on disk, and runs of eaft_megatron.train on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.data.conftest import build_tokenizer

if TYPE_CHECKING:
    from eaft_megatron.data.samples import PreparedDataset

HEADS, KV_HEADS, LAYERS = 4, 2, 4


def write_inputs(folder: Path) -> None:
    """model/ (random weights, vocabulary of 259, which no padding divides), train.jsonl and held_out.jsonl."""
    write_model(folder / "model", build_tokenizer())
    for name, start, count in (("train", 0, 24), ("held_out", 100, 5)):
        rows = [_chat(number) for number in range(start, start + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, tokenizer: Any) -> None:
    """A tiny Llama for a tokenizer, as a Hugging Face folder."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _chat(number: int) -> dict:
    """Answers of very unequal length, so that the loss masks of micro-batches and ranks differ."""
    question, answer = f"{number} + 1?", f"{number + 1}, " * (1 + number * 7 % 11)
    roles = [("system", "add"), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def samples(model: Path, file: Path, seq_length: int) -> PreparedDataset:
    """A JSONL file as `--data` reads it."""
    import transformers

    from eaft_megatron.data.prepare import prepare_in_memory
    from eaft_megatron.data.prepare_options import PrepareOptions
    from eaft_megatron.data.samples import PreparedDataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    data = prepare_in_memory(file, tokenizer, PrepareOptions(seq_length, pack=False))
    return PreparedDataset(data, seq_length, packed=False)


def arguments(folder: Path, run: str, *extra: str) -> list[str]:
    """Flags of a five-step run on the tiny model; later flags win."""
    return [
        *("--hf-model", str(folder / "model"), "--data", str(folder / "train.jsonl")),
        *("--eval-data", f"target={folder / 'held_out.jsonl'}", "--run-dir", str(folder / run)),
        *("--seq-length", "128", "--micro-batch-size", "1", "--global-batch-size", "8", "--train-iters", "5"),
        *("--lr", "1e-3", "--lr-warmup-fraction", "0", "--lr-decay-style", "constant", "--device", "cpu"),
        *("--loss-type", "eaft", *extra),
    ]


def train_in_process(argv: list[str]) -> None:
    """For run_distributed: train.main in a process whose group is up already."""
    from eaft_megatron.train import main

    assert main(argv) == 0


def torchrun(processes: int, argv: list[str], **kwargs) -> subprocess.Popen:
    """``torchrun -m eaft_megatron.train`` as a user starts it, output captured together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "eaft_megatron.train", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def metrics(folder: Path, run: str, *, evaluation: bool = False) -> list[dict]:
    """Rows of a run's metrics.jsonl: those of training, or those of evaluation."""
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if ("eval" in row) == evaluation]
