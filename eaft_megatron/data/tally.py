"""Encoded samples into record batches of the parts they belong to; everything is counted."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from eaft_megatron.data.encoding import EncodedBatch
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import ROW_SCHEMA

INPUT_COUNTS = (
    "input_rows",
    "rows_with_errors",
    "rows_with_text_left_out",
    "turns_not_trained_by_flag",
    "rows_split_into_turns",
    "tokens_repeated_by_splits",
    "answers_without_end_token",
)
PART_COUNTS = (
    "tokens",
    "trained_tokens",
    "truncated",
    "tokens_cut_off",
    "dropped_overlong",
    "dropped_nothing_to_train_on",
)
_ERRORS_KEPT = 20  # messages; all errors are counted


class Tally:
    """Samples into record batches of their parts, and everything counted."""

    def __init__(self, options: PrepareOptions) -> None:
        self.options = options
        self.input = collections.Counter(dict.fromkeys(INPUT_COUNTS, 0))
        self.errors: list[str] = []
        self.parts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in options.splits}
        self.lengths: dict[str, list[np.ndarray]] = {name: [] for name in options.splits}
        self.max_token_id = dict.fromkeys(options.splits, -1)

    def add(self, encoded: EncodedBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
        """(part, record batch) for each part that gets a row of these."""
        first = self.input["input_rows"]
        self.input["input_rows"] += encoded.rows
        self.input["rows_with_errors"] += len(encoded.errors)
        self.input["rows_with_text_left_out"] += encoded.lossy
        self.input["turns_not_trained_by_flag"] += encoded.untrained
        self.input["rows_split_into_turns"] += encoded.split
        self.input["tokens_repeated_by_splits"] += encoded.repeated
        self.input["answers_without_end_token"] += encoded.unended
        self.errors += [*encoded.errors, *encoded.losses][: _ERRORS_KEPT - len(self.errors)]
        kept: dict[str, list[tuple[np.ndarray, np.ndarray, int, str]]] = {name: [] for name in self.parts}
        for index, where, ids, mask in encoded.samples:
            part = self._part_of(first + index)
            if self._fits(ids, mask, self.parts[part]):
                limit = self.options.seq_length + 1
                kept[part].append((ids[:limit], mask[:limit], first + index, where))
        for part, rows in kept.items():
            if rows:
                yield part, self._record_batch(part, rows)

    def _part_of(self, sequence_id: int) -> str:
        """Turns of one conversation always land in one part."""
        if len(self.parts) == 1:
            return "train"
        digest = hashlib.sha256(f"{self.options.seed}:{sequence_id}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        if draw < self.options.valid_fraction:
            return "valid"
        return "test" if draw < self.options.valid_fraction + self.options.test_fraction else "train"

    def _fits(self, ids: np.ndarray, mask: np.ndarray, counts: collections.Counter) -> bool:
        """Whether a row is kept; what it loses by being cut is counted."""
        limit = self.options.seq_length + 1
        if len(ids) > limit:
            if self.options.overlong == "drop":
                counts["dropped_overlong"] += 1
                return False
            counts["truncated"] += 1
            counts["tokens_cut_off"] += len(ids) - limit
        if not mask[1:limit].any():  # nothing predicts the first token
            counts["dropped_nothing_to_train_on"] += 1
            return False
        return True

    def _record_batch(self, part: str, rows: list[tuple[np.ndarray, np.ndarray, int, str]]) -> pa.RecordBatch:
        ids, masks, sequence_ids, sources = (list(column) for column in zip(*rows, strict=True))
        counts = self.parts[part]
        counts["tokens"] += sum(map(len, ids))
        counts["trained_tokens"] += sum(int(mask[1:].sum()) for mask in masks)
        self.lengths[part].append(np.array([len(row) for row in ids]))
        self.max_token_id[part] = max(self.max_token_id[part], *(int(row.max()) for row in ids))
        columns = (ids, masks, sequence_ids, sources)
        arrays = [pa.array(values, type=field.type) for values, field in zip(columns, ROW_SCHEMA, strict=True)]
        return pa.record_batch(arrays, schema=ROW_SCHEMA)
