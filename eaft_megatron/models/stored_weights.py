"""A model's parameters as a torch_dist checkpoint stores them: keys, shapes, types, and whether they are all there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaft_megatron.models.architecture import Entry, is_copy_of_embedding
from eaft_megatron.models.config_fields import is_tied, model_sizes
from eaft_megatron.models.hf_config import architecture_of
from eaft_megatron.models.hf_files import HFTensors
from eaft_megatron.models.torch_dist import CheckpointReader, Piece
from eaft_megatron.models.transforms import ModelSizes

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDING = "embedding.word_embeddings.weight"
_NOT_WEIGHTS = ("optimizer.", "chained_")  # how the keys of optimizer state begin


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model, of one layer or (layer None) of none.

    megatron-core stores a norm under the name it has with Transformer Engine, whichever layer spec the model was built
    with (sharded_state_dict_keys_map of its layer specs): the last name of the table's line.
    """

    entry: Entry
    layer: int | None
    num_layers: int

    @property
    def names(self) -> list[str]:
        """Of the Hugging Face tensors."""
        return self.entry.names(self.layer)

    @property
    def key(self) -> str:
        """In a checkpoint whose layers are stacked."""
        return self.entry.megatron[-1].replace("layers.{i}.", "layers.")

    def shape(self, sizes: ModelSizes) -> tuple[int, ...]:
        """Of the whole parameter, as one tensor-parallel rank alone would hold it."""
        sources = [torch.empty(shape, device="meta") for shape in self.entry.shapes(sizes)]
        return tuple(self.entry.kind.to_megatron(sources, 0, 1, sizes).shape)

    def find(self, reader: CheckpointReader) -> tuple[str, int | None]:
        """(key, index into its stack or None): layers may be stacked, or stored each under a key of its own."""
        for name in reversed(self.entry.megatron):
            if (stacked := name.replace("layers.{i}.", "layers.")) in reader.tensors:
                return stacked, self.layer
            if (single := name.replace("{i}", str(self.layer))) in reader.tensors:
                return single, None
        raise ValueError(f"{self.key} (for {', '.join(self.names)}) is missing from {reader.folder}")

    def read(self, reader: CheckpointReader) -> Tensor:
        return reader.read(*self.find(reader))

    def empty_objects(self) -> list[str]:
        """Keys of the _extra_state that megatron-core's and Transformer Engine's modules ask for at load.

        It holds the scales of FP8 training; None says that there are none. Which modules have one differs between
        layer specs and releases; one too many does no harm.
        """
        modules = [self.key.rpartition(".")[0]]
        if not modules[0].startswith("decoder."):
            return []
        if self.layer is not None:
            modules.append("decoder.layers.self_attention.core_attention")
        shard = "0_1" if self.layer is None else f"{self.layer}_{self.num_layers}"
        return [f"{module}._extra_state/shard_{shard}" for module in modules]


def weights_of(hf_config: dict) -> list[Weight]:
    """Every parameter of the model, what belongs to no layer first, then layer by layer."""
    tied, layers = is_tied(hf_config), hf_config["num_hidden_layers"]
    table = [item for item in architecture_of(hf_config).table(tied) if not is_copy_of_embedding(item, tied)]
    single = [Weight(item, None, layers) for item in table if not item.per_layer]
    return single + [Weight(item, layer, layers) for layer in range(layers) for item in table if item.per_layer]


def check_source(tensors: HFTensors, weights: list[Weight], sizes: ModelSizes) -> list[Piece]:
    """What to store for each weight, given files that hold all of it.

    Raises:
        ValueError: tensors of one parameter, or a parameter in different layers, differ in type.
    """
    first: dict[str, tuple[torch.dtype, str]] = {}
    pieces = []
    for weight in weights:
        for name in weight.names:
            dtype = _DTYPES[tensors[name].get_dtype()]
            expected, other = first.setdefault(weight.key, (dtype, name))
            if dtype != expected:
                raise ValueError(
                    f"{name} is {dtype} but {other} is {expected}: they are stored as one parameter, convert one first"
                )
        pieces.append(Piece(weight.key, weight.shape(sizes), first[weight.key][0], weight.layer, weight.num_layers))
    return pieces


def check_stored(reader: CheckpointReader, weights: list[Weight], hf_config: dict) -> tuple[list[Piece], ModelSizes]:
    """What the checkpoint stores for each weight, and the model's sizes with the vocabulary as padded there.

    Raises:
        ValueError: a tensor missing, one too many, or one of a shape that the configuration does not have.
    """
    sizes = _stored_sizes(reader, weights, hf_config)
    pieces, seen = [], set()
    for weight in weights:
        key, index = weight.find(reader)
        seen.add(key)
        size = list(reader.tensors[key].size)
        piece = Piece(key, weight.shape(sizes), reader.tensors[key].properties.dtype, index, weight.num_layers)
        expected = list(piece.shape) if index is None else [weight.num_layers, *piece.shape]
        if size != expected:
            raise ValueError(f"{key} in {reader.folder} has shape {size}, the model of config.json needs {expected}")
        pieces.append(piece)
    for key in reader.tensors:
        if key not in seen and not key.startswith(_NOT_WEIGHTS):
            raise ValueError(f"{key} in {reader.folder} has no place in a {architecture_of(hf_config).name}")
    return pieces, sizes


def _stored_sizes(reader: CheckpointReader, weights: list[Weight], hf_config: dict) -> ModelSizes:
    embedding = next(weight for weight in weights if _EMBEDDING in weight.entry.megatron)
    rows, vocab = reader.tensors[embedding.find(reader)[0]].size[0], hf_config["vocab_size"]
    if rows < vocab:
        raise ValueError(
            f"{reader.folder}: the embedding has {rows} rows, fewer than config.json's vocab_size {vocab}: "
            "is it the configuration of another model?"
        )
    return replace(model_sizes(hf_config, vocab), padded_vocab=rows)
