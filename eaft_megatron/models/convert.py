"""Hugging Face folder <-> checkpoint that Megatron-LM loads at any TP x PP: ``eaft-megatron convert``.

Both directions read and write tensor by tensor, and need neither a GPU nor a process group nor megatron-core. What is
written goes into a hidden folder beside the target that is renamed when all of it is there.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.checkpoint_files import HF_SUBFOLDER, RECORD, RELEASE, TRACKER, is_whole, newest_checkpoint
from eaft_megatron.files import new_folder, write_json, write_text
from eaft_megatron.models.config_fields import is_tied, model_sizes
from eaft_megatron.models.hf_config import architecture_of, read_hf_config
from eaft_megatron.models.hf_files import HFTensors
from eaft_megatron.models.hf_writer import SafetensorsWriter, carry_files, check_output, finish_shards, write_config
from eaft_megatron.models.megatron_config import padded_vocab_size
from eaft_megatron.models.pretrain_flags import pretrain_flags
from eaft_megatron.models.stored_weights import Weight, check_source, check_stored, weights_of
from eaft_megatron.models.torch_dist import CheckpointReader, Piece, write_checkpoint
from eaft_megatron.models.transforms import ModelSizes

FORMAT_VERSION = 1


def convert_to_megatron(
    hf_dir: str | Path,
    output_dir: str | Path,
    *,
    transformer_impl: str = "transformer_engine",
    check: bool = False,
    progress: bool = False,
) -> dict:
    """Write output_dir from a Hugging Face folder; returns what eaft_model.json holds.

    output_dir: the tracker file, ``release/`` (a torch_dist checkpoint of the weights as one process would hold them,
    the vocabulary padded to a multiple of 128), ``hf/`` (config.json, tokenizer) and eaft_model.json.
    transformer_impl: which implementation the flags in eaft_model.json name; the weights fit both.
    check: read everything back and compare it with the source, bit by bit, before the folder gets its name.

    Raises:
        ValueError: before anything is written: a model unknown here, tensors missing, left over, of the wrong shape
            or of unlike types, or an output_dir that is not empty. With check: a tensor that reads back differently.
    """
    output, hf_config = Path(output_dir).absolute(), read_hf_config(hf_dir)
    check_output(output, None)
    sizes, weights = model_sizes(hf_config, padded_vocab_size(hf_config["vocab_size"], 1)), weights_of(hf_config)
    with HFTensors(hf_dir) as tensors:
        tensors.check(_hf_shapes(hf_config, sizes))
        pieces = check_source(tensors, weights, sizes)
        source = _Folder(Path(hf_dir), dict(tensors.file_of))
    record = _record(hf_config, {piece.dtype for piece in pieces}, transformer_impl)
    empty = list(dict.fromkeys(key for weight in weights for key in weight.empty_objects()))
    weight_of = dict(zip(pieces, weights, strict=True))
    with new_folder(output) as folder:
        (folder / RELEASE).mkdir()
        with _bar(sum(piece.bytes for piece in pieces), "writing", progress) as bar:

            def tensor(piece: Piece) -> Tensor:
                bar.update(piece.bytes)
                return source.parameter(weight_of[piece], sizes)

            write_checkpoint(folder / RELEASE, pieces, tensor, empty, _common(hf_config))
        if check:
            _compare(CheckpointReader(folder / RELEASE), source, weights, sizes, progress)
        (folder / HF_SUBFOLDER).mkdir()
        carry_files(source.path, folder / HF_SUBFOLDER)
        shutil.copyfile(source.path / "config.json", folder / HF_SUBFOLDER / "config.json")
        write_json(folder / RECORD, record)
        write_text(folder / TRACKER, f"{RELEASE}\n")
    return record


def convert_to_hf(
    megatron_dir: str | Path,
    output_dir: str | Path,
    *,
    hf_config_dir: str | Path | None = None,
    check: bool = False,
    progress: bool = False,
) -> None:
    """Write a Hugging Face folder from a checkpoint of the folder `convert_to_megatron` or a training run wrote.

    megatron_dir: a folder with a tracker file (its newest checkpoint is taken), or one checkpoint in it.
    hf_config_dir: a Hugging Face folder of the same model, whose config.json, tokenizer and licence go along;
        megatron_dir/hf where it is not given. check: as above.

    Tensors keep the type they have in the checkpoint, and config.json says which.

    Raises:
        ValueError: before anything is written: no checkpoint or configuration found, tensors missing, left over or
            of the wrong shape, or an output_dir that is not empty. With check: a tensor that reads back differently.
    """
    checkpoint, config_dir = _find(Path(megatron_dir), hf_config_dir)
    output = Path(output_dir).absolute()
    hf_config = read_hf_config(config_dir)
    check_output(output, None)
    reader, weights = CheckpointReader(checkpoint), weights_of(hf_config)
    stored, sizes = check_stored(reader, weights, hf_config)
    with new_folder(output) as folder:
        writer = SafetensorsWriter(folder)
        with _bar(sum(piece.bytes for piece in stored), "writing", progress) as bar:
            for weight, piece in zip(weights, stored, strict=True):
                for name, value in zip(weight.names, _hf_tensors(reader, weight, sizes), strict=True):
                    writer.add(name, value)
                bar.update(piece.bytes)
            writer.flush()
        finish_shards(folder, _hf_shapes(hf_config, sizes))
        if check:
            with HFTensors(folder) as tensors:
                written = _Folder(folder, dict(tensors.file_of))
            _compare(reader, written, weights, sizes, progress)
        carry_files(config_dir, folder)
        write_config(folder, _with_dtype(hf_config, {piece.dtype for piece in stored}))


@dataclass(frozen=True)
class _Folder:
    """Hugging Face tensors read with their file open for that long only: pages of an open file stay in memory."""

    path: Path
    file_of: dict[str, Path]

    def open(self, weight: Weight) -> HFTensors:
        return HFTensors(self.path, sorted({self.file_of[name] for name in weight.names}))

    def parameter(self, weight: Weight, sizes: ModelSizes) -> Tensor:
        """The whole parameter, as one tensor-parallel rank alone would hold it."""
        with self.open(weight) as tensors:
            value = weight.entry.kind.to_megatron([tensors[name] for name in weight.names], 0, 1, sizes)
            return value.clone(memory_format=torch.contiguous_format)  # what was read may be a view of the file


def _compare(
    reader: CheckpointReader, folder: _Folder, weights: list[Weight], sizes: ModelSizes, progress: bool
) -> None:
    """ValueError naming the first tensor that is not the same, bit by bit, in checkpoint and Hugging Face folder."""
    with _bar(len(weights), "checking", progress, unit="it") as bar:
        for weight in weights:
            with folder.open(weight) as tensors:
                for name, ours in zip(weight.names, _hf_tensors(reader, weight, sizes), strict=True):
                    theirs = tensors[name][:]
                    if ours.dtype != theirs.dtype or not torch.equal(_bits(ours), _bits(theirs)):
                        raise ValueError(f"check failed: {name} differs between {folder.path} and {reader.folder}")
            bar.update(1)


def _hf_shapes(hf_config: dict, sizes: ModelSizes) -> dict[str, list[int]]:
    return architecture_of(hf_config).hf_shapes(is_tied(hf_config), hf_config["num_hidden_layers"], sizes)


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, so that a NaN equals itself and 0.0 is not -0.0."""
    return tensor.contiguous().view(torch.uint8)


def _hf_tensors(reader: CheckpointReader, weight: Weight, sizes: ModelSizes) -> list[Tensor]:
    return weight.entry.kind.to_hf([weight.read(reader)], sizes)


def _bar(total: int, what: str, shown: bool, unit: str = "B") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=not shown)


def _record(hf_config: dict, dtypes: set[torch.dtype], transformer_impl: str) -> dict:
    """eaft_model.json. Flags are None, and flags_refused says why, for a model that pretrain_gpt.py cannot build."""
    record = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture_of(hf_config).name,
        "true_vocab_size": hf_config["vocab_size"],
        "tied": is_tied(hf_config),
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
    }
    try:
        return {**record, "pretrain_gpt_flags": pretrain_flags(hf_config, transformer_impl=transformer_impl)}
    except ValueError as error:
        return {**record, "pretrain_gpt_flags": None, "flags_refused": str(error)}


def _common(hf_config: dict) -> dict:
    """common.pt: what Megatron-LM looks at when it loads weights; the arguments are those it compares its own with."""
    args = argparse.Namespace(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        num_attention_heads=hf_config["num_attention_heads"],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0}


def _find(folder: Path, hf_config_dir: str | Path | None) -> tuple[Path, Path]:
    """(checkpoint, folder of config.json) for what the user named."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give what was converted, or the --save folder of a training run")
    checkpoint, root = folder, folder.parent
    if not is_whole(folder):
        name = newest_checkpoint(folder)
        if name is None:
            raise ValueError(f"{folder} has neither {TRACKER} nor .metadata: it holds no checkpoint")
        checkpoint, root = folder / name, folder
    if hf_config_dir is not None:
        return checkpoint, Path(hf_config_dir)
    if not (root / HF_SUBFOLDER).is_dir():
        raise ValueError(
            f"{root} has no {HF_SUBFOLDER} subfolder: name the Hugging Face folder that the model came from, "
            "--hf-config DIR"
        )
    return checkpoint, root / HF_SUBFOLDER


def _with_dtype(hf_config: dict, dtypes: set[torch.dtype]) -> dict:
    """config.json with the type the tensors have, where it is one."""
    if len(dtypes) != 1:
        return hf_config
    fields = [name for name in ("torch_dtype", "dtype") if name in hf_config] or ["torch_dtype"]
    return {**hf_config, **dict.fromkeys(fields, str(*dtypes).removeprefix("torch."))}
