"""A HybridModel's checkpoint under GPTModel's names. Needs torch alone.

HybridModel counts attention and MLP as a layer each, stores every layer by itself, and calls the last norm another
name; the tensors are the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_LAST_NORM = {"decoder.final_norm.weight": "decoder.final_layernorm.weight"}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def gpt_names(keys: Collection[str]) -> dict[str, str]:
    """GPTModel's name -> stored key, for every key; the same twice where a GPTModel was stored.

    Raises:
        ValueError: a hybrid stack that is no stack of attention and MLP in turn.
    """
    if not _LAST_NORM.keys() <= set(keys):
        return {key: key for key in keys}
    inside: dict[int, dict[str, str]] = {}
    for key in keys:
        if match := _LAYER.fullmatch(key):
            inside.setdefault(int(match[1]), {})[key] = match[2]
    stored = {_LAST_NORM.get(key, key): key for key in keys if not _LAYER.fullmatch(key)}
    for place, number in enumerate(sorted(inside)):
        kind = "self_att" if place % 2 == 0 else "mlp"
        if not any(kind in rest for rest in inside[number].values()):
            raise ValueError(
                f"layer {number} of this HybridModel is no {'attention' if place % 2 == 0 else 'MLP'} layer: only "
                "patterns of *- repeated are a Hugging Face model that is known here"
            )
        stored |= {f"decoder.layers.{place // 2}.{rest}": key for key, rest in inside[number].items()}
    return stored


def layer_pattern(layers: int, pipeline_model_parallel_size: int = 1) -> str:
    """``--hybrid-layer-pattern`` of so many transformer blocks, the pipeline's stages of nearly equal length.

    Raises:
        ValueError: fewer blocks than stages.
    """
    stages = pipeline_model_parallel_size
    if not 1 <= stages <= layers:
        raise ValueError(f"--pipeline-model-parallel-size {stages}: the model has {layers} layers to share out")
    ends = [layers * (stage + 1) // stages for stage in range(stages)]
    starts = [0, *ends[:-1]]
    return "|".join("*-" * (end - start) for start, end in zip(starts, ends, strict=True))
