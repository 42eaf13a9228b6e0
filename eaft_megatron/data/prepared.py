"""A prepared folder: tokenized rows, memory-mapped, with a manifest that says what they are.

    manifest.json            written last: a folder without it is not a prepared one
    rows/data-*.arrow        input_ids list<int32>, labels_mask list<bool>, sequence_id int64, source string
    packing.arrow            rows list<int64>: the rows of each pack; remade by ``prepare --repack``
    columns/NAME/*.arrow     one float32 for each token of each row, beside the rows (``eaft-megatron score``)

The value at position i of a per-token column, the mask included, belongs to the token at position i *as a label*.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from eaft_megatron.data.arrow import ArrowShards, ShardWriter
from eaft_megatron.data.packing import best_fit_decreasing
from eaft_megatron.files import replace_folder, replacing, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ROW_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels_mask", pa.list_(pa.bool_())),
        ("sequence_id", pa.int64()),
        ("source", pa.string()),
    ]
)
_PACK_SCHEMA = pa.schema([("rows", pa.list_(pa.int64()))])


class Row(NamedTuple):
    """One tokenized conversation (or turn, or text): n tokens."""

    input_ids: np.ndarray  # [n] int32
    labels_mask: np.ndarray  # [n] bool; True where the token is trained on
    sequence_id: int  # the input row it came from, counted from 0
    source: str  # where that row stood: file and line


class PreparedData:
    """A prepared folder, opened. Cheap: nothing is read but the manifest and the lengths.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a prepared folder, one of another format, or one that has lost files or rows.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        folder = Path(path)
        manifest = read_manifest(folder)
        rows = ArrowShards([folder / "rows" / file["name"] for file in manifest["files"]])
        for shard in rows.paths:
            if not os.path.isfile(shard):
                raise ValueError(f"{folder}: {shard} is missing: prepare the data again")
        if len(rows) != manifest["rows"]:
            raise ValueError(f"{folder}: {len(rows)} rows, but its manifest says {manifest['rows']}: prepare it again")
        self._set(folder, manifest, rows)

    def _set(self, path: Path, manifest: dict[str, Any], rows: ArrowShards) -> None:
        self.path, self.manifest, self._rows = path, manifest, rows
        self._columns: dict[str, ArrowShards] = {}

    @classmethod
    def in_memory(cls, path: Path, manifest: dict[str, Any], batches: Sequence[pa.RecordBatch]) -> PreparedData:
        """What a folder would hold, of the file ``path``: ``batches`` of :data:`ROW_SCHEMA`, without packing."""
        data = cls.__new__(cls)
        data._set(path, manifest, ArrowShards.in_memory(batches))
        return data

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __getitem__(self, index: int) -> Row:
        return Row(
            self._rows.values("input_ids", index),
            self._rows.values("labels_mask", index),
            self._rows.scalar("sequence_id", index),
            self._rows.scalar("source", index),
        )

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """``input_ids`` and ``labels_mask`` of one row, without the rest."""
        return self._rows.values("input_ids", index), self._rows.values("labels_mask", index)

    def sequence_id(self, index: int) -> int:
        """Which input row this one came from."""
        return self._rows.scalar("sequence_id", index)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """``[rows]`` int64: tokens of each row."""
        return self._rows.lengths("input_ids")

    @functools.cached_property
    def packs(self) -> ArrowShards | None:
        """The packs, or None if the folder has none."""
        packing = self.manifest["packing"]
        return None if packing is None else ArrowShards([self.path / packing["file"]])

    def pack(self, index: int) -> np.ndarray:
        """``[r]`` int64: the rows of one pack."""
        if self.packs is None:
            raise ValueError(f"{self.path} has no packs: `eaft-megatron prepare --repack` makes them")
        return self.packs.values("rows", index)

    @property
    def max_token_id(self) -> int:
        """The largest token id of any row; a model needs a vocabulary beyond it."""
        return self.manifest["max_token_id"]

    def columns(self) -> dict[str, dict[str, Any]]:
        """The per-token columns beside the rows: name -> what its own record says."""
        records = {}
        for record in sorted(self.path.glob(f"columns/*/{MANIFEST}")):
            if not record.parent.name.startswith("."):  # one that was being written
                records[record.parent.name] = json.loads(record.read_text(encoding="utf-8"))
        return records

    def column(self, name: str, index: int) -> np.ndarray:
        """``[n]`` float32: a per-token column of one row.

        Raises:
            ValueError: no such column, or one that does not have a value for each token.
        """
        if name not in self._columns:
            self._columns[name] = self._open_column(name)
        return self._columns[name].values(name, index)

    def _open_column(self, name: str) -> ArrowShards:
        records = self.columns()
        if name not in records:
            raise ValueError(
                f"{self.path} has no column {name!r} (it has: {', '.join(records) or 'none'}); `eaft-megatron score` "
                "makes ref_logprob and the entropies"
            )
        folder = self.path / "columns" / name
        shards = ArrowShards([folder / file["name"] for file in records[name]["files"]])
        if not np.array_equal(shards.lengths(name), self.lengths):
            raise ValueError(f"{folder}: not one value for each token of each row: score the data again")
        return shards

    def check_tokenizer(self, tokenizer: Any) -> None:
        """``ValueError`` unless the data was prepared with this very tokenizer (the chat template may differ)."""
        if tokenizer_hash(tokenizer) != self.manifest["tokenizer"]["sha256"]:
            raise ValueError(
                f"{self.path} was prepared with another tokenizer ({self.manifest['tokenizer']['name']}) than "
                f"{getattr(tokenizer, 'name_or_path', 'this one')}: its token ids mean other words. Prepare the data "
                "with the model's own tokenizer"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, checked; errors as in :class:`PreparedData`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        parts = [name for name in ("train", "valid", "test") if (folder / name / MANIFEST).is_file()]
        hint = f": name one of its parts, {', '.join(str(folder / part) for part in parts)}" if parts else ""
        raise ValueError(f"{folder} is not a prepared folder (no {MANIFEST}); `eaft-megatron prepare` makes one{hint}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}): prepare the data again") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: format version {manifest.get('format_version')}, but this release reads {FORMAT_VERSION}: "
            "prepare the data again"
        )
    return manifest


def content_of(manifest: dict[str, Any]) -> list[Any]:
    """What decides the rows and their packs, without the names under which the inputs were found."""
    inputs = [source["fingerprint"] for source in manifest["inputs"]]
    tokenizer = [manifest["tokenizer"]["sha256"], manifest["tokenizer"]["chat_template_sha256"]]
    return [inputs, tokenizer, manifest["options"], manifest["part"], manifest["rows"], manifest["packing"]]


def training_folder(folder: str | os.PathLike) -> Path:
    """``folder`` itself, or its part ``train`` where ``prepare --valid-fraction`` has split it."""
    folder = Path(folder)
    part = folder / "train"
    return part if not (folder / MANIFEST).exists() and (part / MANIFEST).is_file() else folder


def evaluation_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """The parts ``valid`` and ``test`` of a split folder, those that are there."""
    folder = Path(folder)
    parts = {} if (folder / MANIFEST).exists() else {name: folder / name for name in ("valid", "test")}
    return {name: part for name, part in parts.items() if (part / MANIFEST).is_file()}


def check_token_ids(data: Any, vocab_size: int, model: str) -> None:
    """``ValueError`` unless ``model`` has every token of ``data`` (anything with ``path`` and ``max_token_id``)."""
    if data.max_token_id >= vocab_size:
        raise ValueError(
            f"{data.path} has token id {data.max_token_id}, but the vocabulary of {model} ends at {vocab_size - 1}: "
            "tokenizer and model do not belong together; `eaft-megatron prepare` it with the tokenizer of the model"
        )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Put the manifest in place in one step."""
    write_json(folder / MANIFEST, manifest)


def write_packing(folder: Path, lengths: np.ndarray, seq_length: int, pad_to_multiple_of: int) -> dict[str, Any]:
    """Pack rows of ``lengths`` tokens into samples of ``seq_length`` positions; returns the manifest's entry.

    A row of n tokens fills n - 1 positions (each position predicts the next token), rounded up to a multiple of
    ``pad_to_multiple_of``.

    Raises:
        ValueError: a row is longer than seq_length + 1 tokens, or the multiple does not divide seq_length.
    """
    check_multiple(seq_length, pad_to_multiple_of)
    positions = np.asarray(lengths) - 1
    if positions.size and int(positions.max()) > seq_length:
        raise ValueError(
            f"{int((positions > seq_length).sum())} of {positions.size} rows are longer than --seq-length {seq_length} "
            f"(the longest has {int(positions.max())} positions): prepare the data again with that length"
        )
    filled = -(-positions // pad_to_multiple_of) * pad_to_multiple_of
    packs = best_fit_decreasing(filled, seq_length)
    name = f"packing-{seq_length}-{pad_to_multiple_of}.arrow"
    with (
        replacing(folder / name) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, _PACK_SCHEMA) as writer,
    ):
        for begin in range(0, len(packs), 65536):
            part = pa.array(packs[begin : begin + 65536], type=pa.list_(pa.int64()))
            writer.write_batch(pa.record_batch([part], schema=_PACK_SCHEMA))
    return {
        "file": name,
        "seq_length": seq_length,
        "pad_to_multiple_of": pad_to_multiple_of,
        "packs": len(packs),
        "efficiency": float(positions.sum() / (len(packs) * seq_length)) if packs else 0.0,
    }


def check_multiple(seq_length: int, pad_to_multiple_of: int) -> None:
    """``ValueError`` unless samples of ``seq_length`` can be cut at multiples of ``pad_to_multiple_of``."""
    if pad_to_multiple_of < 1 or seq_length < 1 or seq_length % pad_to_multiple_of:
        raise ValueError(
            f"--seq-length {seq_length} must be a positive multiple of --pad-to-multiple-of {pad_to_multiple_of}"
        )


def write_column(
    data: PreparedData, name: str, rows: Iterator[np.ndarray], record: dict[str, Any], batch_rows: int = 1024
) -> None:
    """Put a per-token column beside the rows: one array ``[n]`` for each row, in order.

    Written under a temporary name and renamed: a column is whole or not there. An older one of that name is replaced.

    Raises:
        ValueError: an array that does not fit its row, or too few of them.
    """
    final, temporary = data.path / "columns" / name, data.path / "columns" / f".{name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    schema = pa.schema([(name, pa.list_(pa.float32()))])
    written = 0
    with ShardWriter(temporary, schema) as writer:
        pending: list[np.ndarray] = []
        for values in rows:
            if written + len(pending) >= len(data) or len(values) != data.lengths[written + len(pending)]:
                raise ValueError(f"column {name!r}: row {written + len(pending)} does not have a value for each token")
            pending.append(np.asarray(values, dtype=np.float32))
            if len(pending) == batch_rows:
                writer.write(_column_batch(pending, schema))
                written, pending = written + len(pending), []
        writer.write(_column_batch(pending, schema))
        written += len(pending)
    if written != len(data):
        raise ValueError(f"column {name!r}: {written} rows, but the data has {len(data)}")
    write_manifest(temporary, {**record, "rows": written, "files": writer.files})
    replace_folder(temporary, final)
    data._columns.pop(name, None)


def _column_batch(arrays: list[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(arrays, type=schema.field(0).type)], schema=schema)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what decides token ids: vocabulary, merges, added tokens. The chat template is not part of it."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    digest.update(json.dumps(added, sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        merges = json.loads(backend.to_str())["model"].get("merges") or []
        # Older releases of tokenizers write a merge as "a b", newer ones as ["a", "b"].
        digest.update("\n".join(m if isinstance(m, str) else " ".join(m) for m in merges).encode())
    return digest.hexdigest()


def template_hash(template: str | dict | None) -> str | None:
    """SHA-256 of a chat template (or of several, by name), None where there is none."""
    return None if template is None else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
