"""A script in the shape of pretrain_gpt.py for the training loop in megatron-core's own wheel (0.19.2, Python 3.12).

The wheel holds ``megatron.training`` and not the scripts. What they do with a batch is here too: packed (THD) rows,
context parallelism, extra heads, schedule plans.
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import is_first_or_last_pipeline_stage

MODEL_INPUTS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


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
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    reads = mpu.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset, sizes, lambda: reads and _takes_tokens(vp_stage), config
    ).build()


def _has_extra_heads(vp_stage) -> bool:
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _takes_tokens(vp_stage) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or _has_extra_heads(vp_stage)


def get_batch(data_iterator, vp_stage):
    """This rank's part of a micro-batch; a stage between the ends gets the boundaries of packed rows alone."""
    args = get_args()
    if not _takes_tokens(vp_stage) and not args.sft:
        return {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    read = dict(next(data_iterator)) if tp_rank == 0 else {}
    batch = get_batch_on_this_tp_rank(
        {name: value.cuda() if value is not None else None for name, value in read.items()}
        | {name: None for name in (*MODEL_INPUTS, "cu_seqlens", "cu_seqlens_padded", "max_seqlen") if name not in read},
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=args.sft,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_extra_heads(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not _takes_tokens(vp_stage):
        return {name: batch[name] for name in ("cu_seqlens", "max_seqlen")}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def packing(batch):
    """Where packed rows end, for attention; None where a micro-batch holds rows side by side."""
    if batch.get("cu_seqlens") is None:
        return None
    bounds, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def loss_func(loss_mask, output_tensor):
    mask = loss_mask.view(-1).float()
    total = (output_tensor.view(-1).float() * mask).sum()
    count = mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator, model, return_schedule_plan=False):
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    tokens, position_ids, attention_mask, labels, loss_mask = (batch.get(name) for name in MODEL_INPUTS)
    after = partial(loss_func, loss_mask)
    if return_schedule_plan:
        plan = model.build_schedule_plan(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
        return plan, after
    options = dict(labels=labels, loss_mask=loss_mask, packed_seq_params=packing(batch))
    return model(tokens, position_ids, attention_mask, **options), after


def main(model_config):
    datasets.is_distributed = True
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, model_config(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main(gpt_config_from_args)
