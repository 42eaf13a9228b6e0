"""pretrain_gpt.py in small. STYLE=old (0.12 to 0.17) parses within pretrain, STYLE=new (0.18 on) before it."""

import os
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.training import get_args, pretrain
from megatron.training.utils import get_batch_on_this_tp_rank

from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, tiny_config, with_optimizer


def loss_func(loss_mask, output_tensor):
    total = (output_tensor.float() * loss_mask).sum()
    count = loss_mask.sum().int()
    report = torch.stack([total.detach(), count.float()])
    if get_args().report == "tuple":
        torch.distributed.all_reduce(report, group=parallel_state.get_data_parallel_group())
        return total, count, {"lm loss": (report[0], report[1])}
    if get_args().report == "scalar":
        torch.distributed.all_reduce(report, group=parallel_state.get_data_parallel_group())
        return total, count, {"lm loss": report[0] / report[1]}
    return total, count, {"lm loss": report}


def forward_step(data_iterator, model):
    prepared = getattr(get_args(), "sft_data", None)
    batch = get_batch_on_this_tp_rank(data_iterator) if prepared else next(data_iterator)
    given = dict(labels=batch["labels"], loss_mask=batch["loss_mask"])
    if get_args().without_model_loss:
        logits = model(batch["tokens"], batch["position_ids"], None)
        output = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    else:
        output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), **given)
    return output, partial(loss_func, batch["loss_mask"])


def _poisoned(module, inputs, output):
    logits = output[0].clone()
    logits[0, 0, 0] = get_args().poison
    return logits, *output[1:]


def model_provider():
    chunks = build_tiny_gpt(tiny_config())
    if get_args().poison is not None:
        chunks[-1].output_layer.register_forward_hook(_poisoned)
    return with_optimizer(chunks)


if __name__ == "__main__":
    if os.environ.get("STYLE") == "new":
        from megatron.training.arguments import parse_and_validate_args

        parse_and_validate_args()
    pretrain(lambda samples: (None, None, None), model_provider, None, forward_step)
