"""megatron-core's torch_dist checkpoints tensor by tensor, in one process: no group, no model, no megatron-core.

The format is torch.distributed.checkpoint's (``.metadata``, ``*.distcp``), with ``common.pt`` for what is no tensor and
``metadata.json`` to name the format. A transformer layer's parameters are stored stacked: all layers under one key,
[layers, ...], each layer a chunk of its own. Everything is stored unsplit, and megatron-core cuts it at load.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from eaft_megatron.models.hybrid_names import gpt_names

# What megatron.core.dist_checkpointing.core writes into metadata.json.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """One tensor to store: a whole parameter, or (layer given) one layer's part of the stack of num_layers.

    shape: without the stack's dimension.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int | None
    num_layers: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunk(self) -> ChunkStorageMetadata:
        offsets = [0] * len(self.shape)
        if self.layer is None:
            return ChunkStorageMetadata(torch.Size(offsets), torch.Size(self.shape))
        return ChunkStorageMetadata(torch.Size([self.layer, *offsets]), torch.Size([1, *self.shape]))

    def write_item(self) -> WriteItem:
        chunk = self.chunk()
        size = torch.Size(self.shape if self.layer is None else [self.num_layers, *self.shape])
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), size)
        return WriteItem(MetadataIndex(self.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def write_checkpoint(
    folder: Path, pieces: list[Piece], tensor: Callable[[Piece], Tensor], empty_objects: list[str], common: dict
) -> None:
    """Write a checkpoint into the empty folder, its `.metadata` last.

    tensor: called once per piece, in order; what it returns is written at once. torch keeps the last tensor of each
        key until the file is complete: of a stack one layer, so the peak is one layer and what belongs to no layer.
    empty_objects: keys of objects that hold None. common: the content of common.pt.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|uninitialized)")
        dcp.save(
            {},
            # No copying ahead: on a machine with a GPU the writer would sort the tensors by size and read several.
            storage_writer=dcp.FileSystemWriter(folder, per_thread_copy_ahead=0),
            planner=_LazyPlanner(pieces, tensor, empty_objects),
            no_dist=True,
        )
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))


class _LazyPlanner(SavePlanner):
    """Announces every piece by shape and type, and makes its tensor when it is that one's turn to be written."""

    def __init__(self, pieces: list[Piece], tensor: Callable[[Piece], Tensor], empty_objects: list[str]) -> None:
        self.pieces = {self._index(piece.write_item()): piece for piece in pieces}
        assert len(self.pieces) == len(pieces), "a piece that comes twice"
        self.tensor, self.empty_objects = tensor, empty_objects

    @staticmethod
    def _index(item: WriteItem) -> tuple[str, Any]:
        return item.index.fqn, item.index.offset

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.empty_objects]
        return SavePlan([*objects, *(piece.write_item() for piece in self.pieces.values())])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)  # a list: of the objects that one rank would bring
            return buffer
        piece = self.pieces[self._index(write_item)]
        tensor = self.tensor(piece)
        assert (tensor.shape, tensor.dtype) == (piece.shape, piece.dtype), f"{piece}: {tensor.shape}, {tensor.dtype}"
        return tensor.contiguous().view(piece.chunk().sizes)


class CheckpointReader:
    """The tensors of one checkpoint (a folder with `.metadata`), read when asked for.

    tensors: key -> size ([layers, ...] where stacked), properties (dtype), chunks; a HybridModel has GPTModel's keys.

    Raises:
        ValueError: no such checkpoint, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = dcp.FileSystemReader(folder)
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{folder} has no .metadata: it is no (complete) torch_dist checkpoint")
        try:
            metadata = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f"{folder / '.metadata'} cannot be read: {error!r}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata
        tensors = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
        self._stored = gpt_names(tensors)
        self.tensors = {name: tensors[key] for name, key in self._stored.items()}

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The whole tensor, or one layer of a stack without the stack's dimension; put together from its chunks."""
        stored = self.tensors[key]
        size = list(stored.size)
        offsets, sizes = [0] * len(size), size
        if layer is not None:
            offsets[0], sizes = layer, [1, *size[1:]]
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(self._stored[key], stored, [wanted])
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise ValueError(f"{self.folder}: the stored chunks do not make up the whole of {key}")
        try:
            self._reader.read_data(LoadPlan(items), _Fill(target)).wait()
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            raise ValueError(f"{self.folder}: {key} cannot be read, is a file damaged or missing? ({error})") from error
        return target if layer is None else target[0]


class _Fill(LoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError  # this and the rest: the plan is made by hand

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]
