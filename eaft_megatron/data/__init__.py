"""Rows as people store them -> tokens, labels and loss masks, in an order that depends on nothing but the seed."""

from eaft_megatron.data.batches import collate, micro_batch_indices
from eaft_megatron.data.chat import EncodedRow, EncodedSample, encode_row, encode_text
from eaft_megatron.data.layouts import Columns, canonical_row
from eaft_megatron.data.sources import Source, open_sources

__all__ = [
    "Columns",
    "EncodedRow",
    "EncodedSample",
    "Source",
    "canonical_row",
    "collate",
    "encode_row",
    "encode_text",
    "micro_batch_indices",
    "open_sources",
]
