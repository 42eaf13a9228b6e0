"""What the code knows about one model family: its weight table, and how its config.json reads. Needs torch alone.

Adding a family means one file with one `Architecture` (llama.py shows how) and its name in hf_config.ARCHITECTURES.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eaft_megatron.models.transforms import ModelSizes

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Entry:
    """One line of a weight table, read in both directions.

    megatron: the parameter's name in GPTModel, {i} for the layer; several where it differs between layer specs
        (Transformer Engine moves a norm into the linear layer behind it).
    kind: one of the instances in transforms.py.
    tensors: the Hugging Face tensors it is made of, each (name, dimension, ...), dimensions in words of ModelSizes.
    """

    megatron: tuple[str, ...]
    kind: Any
    tensors: tuple[tuple[str, ...], ...]

    def names(self, layer: int | None) -> list[str]:
        """Hugging Face names for one layer (None where the entry belongs to no layer)."""
        return [tensor[0].replace("{i}", str(layer)) for tensor in self.tensors]

    def shapes(self, sizes: ModelSizes) -> list[list[int]]:
        return [[getattr(sizes, word) for word in tensor[1:]] for tensor in self.tensors]

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.megatron[0]


def entry(megatron: str | tuple[str, ...], kind: Any, *tensors: tuple[str, ...]) -> Entry:
    return Entry((megatron,) if isinstance(megatron, str) else megatron, kind, tensors)


@dataclass(frozen=True)
class Architecture:
    """A model family.

    name: as in config.json's "architectures".
    entries: the weight table, output layer included (left out or taken from the embedding where those are tied).
    check: raises ValueError, naming the field, for config values that could not be honoured.
    transformer_fields: config.json -> keyword arguments of megatron.core's TransformerConfig, parallelism left out.
    model_fields: config.json -> keyword arguments of GPTModel (rotary embedding).
    left_out: config.json -> megatron names of the lines this model does without (biases it may or may not have).
    sandwich_norms: whether the outputs of attention and MLP are normalised too (glm4_spec.py).
    """

    name: str
    entries: tuple[Entry, ...]
    check: Callable[[dict], None]
    transformer_fields: Callable[[dict], dict[str, Any]]
    model_fields: Callable[[dict], dict[str, Any]]
    left_out: Callable[[dict], tuple[str, ...]] = lambda hf_config: ()
    sandwich_norms: bool = False

    def fitted(self, hf_config: dict) -> Architecture:
        """The same with the lines that this config.json's model has."""
        left_out = self.left_out(hf_config)
        return replace(self, entries=tuple(item for item in self.entries if not set(left_out) & set(item.megatron)))

    def table(self, tied: bool) -> tuple[Entry, ...]:
        """The entries; with tied embeddings the output layer reads the embedding's tensor."""
        if not tied:
            return self.entries
        embedding = next(entry for entry in self.entries if _EMBEDDING in entry.megatron)
        return tuple(
            replace(entry, tensors=embedding.tensors) if _OUTPUT in entry.megatron else entry for entry in self.entries
        )

    def hf_shapes(self, tied: bool, num_layers: int, sizes: ModelSizes) -> dict[str, list[int]]:
        """Every tensor a Hugging Face folder of this model holds, with its shape."""
        expected: dict[str, list[int]] = {}
        for item in self.table(tied):
            for layer in range(num_layers) if item.per_layer else [None]:
                expected.update(zip(item.names(layer), item.shapes(sizes), strict=True))
        return expected


def find_entry(table: tuple[Entry, ...], megatron_name: str) -> Entry:
    """The line for a GPTModel parameter such as decoder.layers.3.mlp.linear_fc2.weight; ValueError where none is."""
    pattern = _LAYER.sub("{i}", megatron_name)
    for item in table:
        if pattern in item.megatron:
            return item
    raise ValueError(
        f"the model has a parameter {megatron_name} that this architecture's weight table does not know: "
        "build the model with eaft_megatron.models.build_model, or add the line to the table"
    )


def is_copy_of_embedding(item: Entry, tied: bool) -> bool:
    """Whether this is the output layer of a tied model: a second copy, on the last pipeline stage."""
    return tied and _OUTPUT in item.megatron
