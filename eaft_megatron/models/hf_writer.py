"""Writing a Hugging Face folder: shards first, under provisional names, config.json last, then one rename."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from eaft_megatron.files import write_json
from eaft_megatron.models.hf_files import INDEX, SINGLE, HFTensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHARD_BYTES = 5 * 10**9  # as transformers shards
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_CARRIED_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")


def check_output(output_dir: Path, dtype: torch.dtype | None) -> None:
    """ValueError for an unsupported dtype and for a folder that holds something already."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: use {', '.join(map(str, DTYPES))}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir {output_dir} exists and is not empty: choose another, or remove it first")


class SafetensorsWriter:
    """Collects tensors on the CPU and writes a file into folder whenever 5 GB are together; call flush at the end.

    dtype: what everything is converted to; None keeps each tensor's own. stage: distinguishes concurrent writers.
    """

    def __init__(self, folder: Path, stage: int = 0, dtype: torch.dtype | None = None) -> None:
        self.folder, self.stage, self.dtype = folder, stage, dtype
        self.tensors: dict[str, Tensor] = {}
        self.bytes = self.parts = 0

    def add(self, name: str, tensor: Tensor) -> None:
        dtype = self.dtype or tensor.dtype
        size = tensor.numel() * dtype.itemsize
        if self.bytes + size > _SHARD_BYTES:
            self.flush()
        # copy: safetensors refuses tensors that share storage, as gate and up of one parameter may.
        self.tensors[name] = tensor.to("cpu", dtype, copy=True).contiguous()
        self.bytes += size

    def flush(self) -> None:
        from safetensors.torch import save_file

        if self.tensors:
            path = self.folder / f"stage-{self.stage:05d}-part-{self.parts:05d}.safetensors"
            save_file(self.tensors, str(path), metadata={"format": "pt"})
            self.tensors, self.bytes, self.parts = {}, 0, self.parts + 1


def finish_shards(folder: Path, expected: dict[str, list[int]]) -> None:
    """Give all writers' files their final names, with an index where there are several.

    Raises:
        ValueError: they do not hold exactly the expected tensors (a writer whose node does not see this folder, say).
    """
    parts = sorted(folder.glob("stage-*.safetensors"))
    with HFTensors(folder, parts) as tensors:
        tensors.check(expected)
        size = tensors.bytes()
        part_of = {name: parts.index(path) for name, path in tensors.file_of.items()}
    total = len(parts)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    for part, name in zip(parts, names, strict=True):
        part.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
        part.rename(folder / name)
    if total > 1:
        weight_map = {name: names[part] for name, part in sorted(part_of.items())}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings, licence: what lies beside the weights. config.json is written apart."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _CARRIED_SUFFIXES or path.name.startswith(_CARRIED_PREFIXES)
        if path.is_file() and wanted and path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def write_config(folder: Path, hf_config: dict) -> None:
    """The last file, without which no loader takes the folder for a model."""
    write_json(folder / "config.json", hf_config)
