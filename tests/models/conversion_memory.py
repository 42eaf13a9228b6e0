"""A process that makes or converts a synthetic model; prints its bytes, or how far memory rose above the start.

    python conversion_memory.py FOLDER model|to-megatron|to-hf SHARD_MB LAYERS

Peaks are VmHWM: everything resident, pages of mapped files included. Linux only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch  # noqa: F401  imported late by what is measured
import torch
import tqdm  # noqa: F401

from eaft_megatron.models import hf_writer
from eaft_megatron.models.config_fields import model_sizes
from eaft_megatron.models.convert import convert_to_hf, convert_to_megatron
from eaft_megatron.models.llama import LLAMA

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_model(folder: Path, layers: int) -> int:
    """A Hugging Face folder of bfloat16 noise, tensor by tensor; returns the bytes of its tensors."""
    config = {**CONFIG, "num_hidden_layers": layers}
    shapes = LLAMA.hf_shapes(False, layers, model_sizes(config, config["vocab_size"]))
    folder.mkdir()
    writer = hf_writer.SafetensorsWriter(folder)
    for name, shape in shapes.items():
        writer.add(name, torch.randn(shape, dtype=torch.bfloat16))
    writer.flush()
    hf_writer.finish_shards(folder, shapes)
    hf_writer.write_json(folder / "config.json", config)
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def peak() -> int:
    """Bytes: the most that was resident since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def growth(action) -> int:
    """Bytes by which the peak during the action exceeds what was resident before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    action()
    return peak() - before


def main(root: Path, step: str, shard_bytes: int, layers: int) -> int:
    hf_writer._SHARD_BYTES = shard_bytes
    if step == "model":
        return write_model(root / "hf", layers)
    if step == "to-megatron":
        return growth(lambda: convert_to_megatron(root / "hf", root / "megatron", check=True))
    return growth(lambda: convert_to_hf(root / "megatron", root / "back", check=True))


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) * 10**6, int(sys.argv[4])))
