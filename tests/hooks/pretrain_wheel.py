"""A pretrain_gpt-style script for the training loop that megatron-core's own wheel carries (0.19.2, Python 3.12)."""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import is_first_or_last_pipeline_stage


def datasets(sizes, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: _has_data(vp_stage), config).build()


def _has_data(vp_stage=None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


def batch(data_iterator, vp_stage):
    """Every tensor-parallel rank's batch: rank 0 reads it, the others are sent it."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"))
    own = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    values = {}
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        dtype = torch.float32 if name == "loss_mask" else torch.int64
        shape = (args.micro_batch_size, args.seq_length)
        values[name] = own[name].cuda().to(dtype) if own else torch.empty(shape, dtype=dtype, device="cuda")
        source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast(values[name], source, group)
    return values


def loss_func(loss_mask, output_tensor):
    total = (output_tensor.float() * loss_mask).sum()
    count = loss_mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator, model):
    values = batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    loss_mask = values["loss_mask"]
    output = model(values["tokens"], values["position_ids"], None, labels=values["labels"], loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


if __name__ == "__main__":
    datasets.is_distributed = True
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
