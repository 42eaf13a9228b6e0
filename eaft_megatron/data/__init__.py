"""Chat and text JSONL -> tokens, labels and loss masks, in an order that depends on nothing but the seed."""

from eaft_megatron.data.batches import collate, micro_batch_indices
from eaft_megatron.data.chat import EncodedRow, EncodedSample, encode_chat, encode_row, encode_text
from eaft_megatron.data.dataset import SFTDataset
from eaft_megatron.data.jsonl import iter_jsonl, read_jsonl
from eaft_megatron.data.layouts import Columns, canonical_row
from eaft_megatron.data.sources import Source, open_sources

__all__ = [
    "Columns",
    "EncodedRow",
    "EncodedSample",
    "SFTDataset",
    "Source",
    "canonical_row",
    "collate",
    "encode_chat",
    "encode_row",
    "encode_text",
    "iter_jsonl",
    "micro_batch_indices",
    "open_sources",
    "read_jsonl",
]
