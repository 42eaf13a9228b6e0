"""The checks that need no other process: does what the recipe names exist and belong together?

Each takes the recipe and returns what to tell when all is well, or raises ``ValueError`` or ``OSError``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from eaft_megatron.checkpoint_files import HF_SUBFOLDER, RECORD, TRACKER, is_whole, newest_checkpoint
from eaft_megatron.launch.command import PLACEHOLDER, build_command, data_parallel_size, run_folder
from eaft_megatron.launch.recipe import Recipe
from eaft_megatron.models.hf_config import read_hf_config
from eaft_megatron.models.megatron_config import check_pipeline, check_tensor_parallel, padded_vocab_size


def check_command(recipe: Recipe) -> str:
    """The recipe says what to run, and all it names is there."""
    command = build_command(recipe)
    if command.missing:
        raise ValueError("; ".join(command.missing))
    layout = recipe.parallel
    model = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}"
    return f"{command.train_iters} steps; {model} x data {data_parallel_size(recipe)}"


def hf_folder(recipe: Recipe) -> Path:
    """Configuration and tokenizer of the model."""
    if recipe.entrypoint == "train":
        return Path(recipe.model.hf or PLACEHOLDER)
    return Path(recipe.model.checkpoint or PLACEHOLDER) / HF_SUBFOLDER


def check_checkpoint(recipe: Recipe) -> str:
    """The weights are whole, and model and vocabulary divide as the recipe wants."""
    config = read_hf_config(hf_folder(recipe))
    check_tensor_parallel(config, recipe.parallel.tensor)
    if not any("pipeline-stage" in flag or "pipeline-model-parallel-layout" in flag for flag in recipe.flags):
        check_pipeline(config, recipe.parallel.pipeline, None)
    vocab = config["vocab_size"]
    padded = padded_vocab_size(vocab, recipe.parallel.tensor)
    if recipe.entrypoint == "train":
        _whole_hf_folder(hf_folder(recipe))
    else:
        _whole_megatron_folder(hf_folder(recipe).parent, vocab)
    return f"vocabulary {vocab}, padded to {padded} for tensor {recipe.parallel.tensor}; {_resumption(recipe)}"


def check_data(recipe: Recipe) -> str:
    """The data was prepared with this model's tokenizer, and to this length."""
    if recipe.data.jsonl:
        with open(recipe.data.jsonl, encoding="utf-8") as lines:
            json.loads(lines.readline())
        return f"{recipe.data.jsonl}: tokenized when training starts"
    if not recipe.data.sft_data:
        return "none named: the flags bring their own"
    from transformers import AutoTokenizer

    from eaft_megatron.data.prepared import PreparedData, check_token_ids, training_folder

    tokenizer = AutoTokenizer.from_pretrained(hf_folder(recipe))
    vocab = read_hf_config(hf_folder(recipe))["vocab_size"]
    sets = {"training": training_folder(recipe.data.sft_data)}
    sets |= {name: training_folder(folder) for name, folder in recipe.data.eval.items()}
    for name, folder in sets.items():
        data = PreparedData(folder)
        data.check_tokenizer(tokenizer)
        check_token_ids(data, vocab, "the model")
        packing = data.manifest["packing"]
        if packing and packing["seq_length"] != recipe.data.seq_length:
            raise ValueError(f"{name}: {folder} is packed to {packing['seq_length']}, not {recipe.data.seq_length}")
    rows = ", ".join(f"{name} {len(PreparedData(folder))} rows" for name, folder in sets.items())
    return f"{rows}; the tokenizer is the model's"


def check_disk(recipe: Recipe) -> str:
    """Room for at least one more checkpoint."""
    folder = run_folder(recipe)
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    needed = _checkpoint_bytes(recipe)
    if free < needed:
        raise ValueError(f"{folder}: {free / 1e9:.0f} GB free, but one checkpoint takes about {needed / 1e9:.0f} GB")
    return f"{free / 1e9:.0f} GB free in {folder}; a checkpoint takes about {needed / 1e9:.1f} GB"


def _checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint with optimizer state: 14 bytes a parameter; the weights that training starts from tell them."""
    folder, pattern = hf_folder(recipe), "*.safetensors"
    if recipe.entrypoint != "train":
        name = newest_checkpoint(folder.parent)
        folder, pattern = folder.parent / (name or PLACEHOLDER), "*.distcp"
    stored = sum(path.stat().st_size for path in folder.glob(pattern))
    config = read_hf_config(hf_folder(recipe)) if stored else {}
    wide = (config.get("dtype") or config.get("torch_dtype")) == "float32"
    return stored * 14 // (4 if wide else 2)


def _whole_hf_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: download or copy it again")


def _whole_megatron_folder(folder: Path, vocab: int) -> None:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if record["true_vocab_size"] != vocab:
        raise ValueError(f"{folder}: {RECORD} says vocabulary {record['true_vocab_size']}, hf/config.json {vocab}")
    name = newest_checkpoint(folder)
    if name is None or not is_whole(folder / name):
        raise ValueError(f"{folder} holds no whole checkpoint: convert the model again")


def _resumption(recipe: Recipe) -> str:
    """What the run will start from; ``ValueError`` if its newest checkpoint is not whole."""
    saved = run_folder(recipe) / "checkpoints"
    name = newest_checkpoint(saved)
    if name is None:
        return f"starts from {recipe.model.hf if recipe.entrypoint == 'train' else recipe.model.checkpoint}"
    if not is_whole(saved / name):
        raise ValueError(f"{saved / TRACKER} names {name}, which is not there or not whole: name an older one in it")
    return f"resumes from {saved / name}"
