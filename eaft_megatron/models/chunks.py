"""A rank's share of a model: its GPTModel chunks, their parameters' names in the whole model, their sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from eaft_megatron.models.config_fields import is_tied
from eaft_megatron.models.transforms import ModelSizes

if TYPE_CHECKING:
    from eaft_megatron.megatron_map import GPTModel

_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def unwrap(model: nn.Module | list[nn.Module]) -> list[GPTModel]:
    """The GPTModel chunks inside, whatever DDP or Float16Module is around them."""
    chunks = []
    chunk: Any
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
            chunk = chunk.module
        if not hasattr(chunk, "decoder"):
            raise ValueError(f"model: a megatron-core GPTModel (or a list of its chunks) is needed, not {type(chunk)}")
        chunks.append(chunk)
    if not chunks:
        raise ValueError("model: the list of chunks is empty")
    return chunks


def parameters(chunks: list[GPTModel]) -> Iterator[tuple[str, int | None, nn.Parameter]]:
    """(name in the whole model, global layer index or None, parameter) for all that this rank holds."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match = _LOCAL_LAYER.match(name)
            if match is None:
                yield name, None, parameter
                continue
            # A chunk counts its layers from 0; layer_number knows the place in the model, from 1.
            layer = chunk.decoder.layers[int(match[1])].layer_number - 1
            yield f"decoder.layers.{layer}.{name[match.end() :]}", layer, parameter


def sizes_of(chunk: Any, hf_config: dict) -> ModelSizes:
    """Sizes of the model as built; the true vocabulary is the configuration's. ValueError where they cannot agree."""
    config, vocab = chunk.config, hf_config["vocab_size"]
    if vocab > chunk.vocab_size:
        raise ValueError(f"config.json: vocab_size {vocab} exceeds the model's padded vocabulary {chunk.vocab_size}")
    tied = is_tied(hf_config)
    if tied != chunk.share_embeddings_and_output_weights:
        raise ValueError(
            f"config.json: tie_word_embeddings is {tied}, but the model was built with "
            f"share_embeddings_and_output_weights={chunk.share_embeddings_and_output_weights}"
        )
    return ModelSizes(
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab=vocab,
        padded_vocab=chunk.vocab_size,
    )
