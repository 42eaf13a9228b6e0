"""Chat and text JSONL -> tokens, labels and loss masks, in an order that depends on nothing but the seed."""

from eaft_megatron.data.batches import collate, micro_batch_indices
from eaft_megatron.data.chat import EncodedSample, encode_chat, encode_text
from eaft_megatron.data.dataset import SFTDataset
from eaft_megatron.data.jsonl import iter_jsonl, read_jsonl

__all__ = [
    "EncodedSample",
    "SFTDataset",
    "collate",
    "encode_chat",
    "encode_text",
    "iter_jsonl",
    "micro_batch_indices",
    "read_jsonl",
]
