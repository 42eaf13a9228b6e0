"""config.json of a Hugging Face folder: read it, find the architecture, refuse what cannot be honoured."""

from __future__ import annotations

import json
from pathlib import Path

from eaft_megatron.models.architecture import Architecture
from eaft_megatron.models.glm4 import GLM4
from eaft_megatron.models.llama import LLAMA
from eaft_megatron.models.qwen import QWEN2, QWEN3

ARCHITECTURES: dict[str, Architecture] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, GLM4)}


def read_hf_config(hf_dir: str | Path) -> dict:
    """Parse hf_dir/config.json and check that the model it describes is one we reproduce exactly.

    Returns the dictionary as it stands in the file.

    Raises:
        ValueError: no such folder or file, not JSON, an architecture without a weight table (the message lists those
            that have one), or a value that megatron-core could not honour; the message names the field.
    """
    folder = Path(hf_dir)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: give a local Hugging Face model folder (config.json, *.safetensors)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: is it a Hugging Face model folder?")
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(hf_config, dict):
        raise ValueError(f"{path} holds no JSON object")
    architecture_of(hf_config).check(hf_config)
    return hf_config


def architecture_of(hf_config: dict) -> Architecture:
    """The architecture config.json names, with the lines its model has; ValueError listing the known ones otherwise."""
    names = hf_config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name].fitted(hf_config)
    known = ", ".join(sorted(ARCHITECTURES))
    what = ", ".join(map(str, names)) or "missing"
    raise ValueError(f'config.json: "architectures" is {what}; known here: {known}')
