"""Arrow shards: written in order, read memory-mapped, a row at a time without a copy.

The files are Arrow streams, what ``datasets.Dataset.from_file`` opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa


class ShardWriter:
    """Record batches into ``data-00000.arrow``, ``data-00001.arrow``, ...; a context manager."""

    def __init__(self, folder: Path, schema: pa.Schema, shard_bytes: int = 512 << 20) -> None:
        self.folder, self.schema, self.shard_bytes = folder, schema, shard_bytes
        self.files: list[dict[str, int | str]] = []
        self._sink: pa.OSFile | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close_shard()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch; a new shard begins where the last one has reached its size."""
        if batch.num_rows == 0:
            return
        if self._sink is not None and self._sink.tell() >= self.shard_bytes:
            self._close_shard()
        if self._writer is None:
            name = f"data-{len(self.files):05d}.arrow"
            self._sink = pa.OSFile(str(self.folder / name), "wb")
            self._writer = pa.ipc.new_stream(self._sink, self.schema)
            self.files.append({"name": name, "rows": 0})
        self._writer.write_batch(batch)
        self.files[-1]["rows"] += batch.num_rows

    def _close_shard(self) -> None:
        for open_file in (self._writer, self._sink):
            if open_file is not None:
                open_file.close()
        self._writer = self._sink = None


class ArrowShards:
    """The rows of several shards, numbered through. Opens them when first used, in each process anew."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [str(path) for path in paths]
        self._table: pa.Table | None = None
        self._chunks: dict[str, list[tuple[np.ndarray, pa.Array]]] = {}
        self._starts: np.ndarray | None = None

    @classmethod
    def in_memory(cls, batches: Sequence[pa.RecordBatch]) -> ArrowShards:
        """Rows that no file holds; at least one batch."""
        shards = cls([])
        shards._table = pa.Table.from_batches(batches)
        return shards

    def __getstate__(self) -> dict:
        return {**vars(self), "_table": None if self.paths else self._table, "_chunks": {}, "_starts": None}

    @property
    def table(self) -> pa.Table:
        """All shards as one memory-mapped table."""
        if self._table is None:
            tables = [pa.ipc.open_stream(pa.memory_map(path)).read_all() for path in self.paths]
            self._table = pa.concat_tables(tables)
        return self._table

    def __len__(self) -> int:
        return self.table.num_rows

    def lengths(self, column: str) -> np.ndarray:
        """``[rows]`` int64: how long each row's list is."""
        parts = [np.diff(chunk.offsets.to_numpy()) for chunk in self.table.column(column).chunks]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def values(self, column: str, row: int) -> np.ndarray:
        """The list of one row. Numbers are a view of the file, flags a copy."""
        chunk, index = self._locate(row)
        offsets, values = self._column(column)[chunk]
        part = values.slice(offsets[index], offsets[index + 1] - offsets[index])
        return part.to_numpy(zero_copy_only=not pa.types.is_boolean(part.type))

    def scalar(self, column: str, row: int):
        """The single value of one row."""
        return self.table.column(column)[row].as_py()

    def _locate(self, row: int) -> tuple[int, int]:
        if self._starts is None:
            sizes = [batch.num_rows for batch in self.table.to_batches()]
            self._starts = np.concatenate([[0], np.cumsum(sizes)])
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} is outside 0..{self._starts[-1] - 1}")
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return chunk, row - int(self._starts[chunk])

    def _column(self, name: str) -> list[tuple[np.ndarray, pa.Array]]:
        if name not in self._chunks:
            chunks = self.table.column(name).chunks
            self._chunks[name] = [(chunk.offsets.to_numpy(), chunk.values) for chunk in chunks]
        return self._chunks[name]
