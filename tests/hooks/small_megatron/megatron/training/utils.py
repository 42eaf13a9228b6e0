"""A micro-batch read on tensor-parallel rank 0 and sent to the others, only the keys that are known (to 0.17)."""

import torch
from megatron.core import parallel_state

_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch_on_this_tp_rank(data_iterator):
    sent = [None]
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        data = next(data_iterator)
        sent = [{key: data[key] for key in _KEYS}]
    source, group = (
        parallel_state.get_tensor_model_parallel_src_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    torch.distributed.broadcast_object_list(sent, source, group=group)
    return sent[0]
