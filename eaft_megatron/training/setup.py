"""Process groups, model, optimizer and schedule, all of them megatron-core's own."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from eaft_megatron.installed import choose_transformer_impl
from eaft_megatron.megatron_map import has
from eaft_megatron.models import build_model, load_hf_weights, read_hf_config, transformer_config


class Trainer(NamedTuple):
    """What a training step needs. ``model`` holds the wrapped chunks of this rank, one unless stages interleave."""

    model: list[Any]
    optimizer: Any
    scheduler: Any


@contextlib.contextmanager
def distributed(args: argparse.Namespace) -> Iterator[torch.device]:
    """The process groups, on NCCL with a GPU per process, else on gloo; yields this process's device."""
    use_cuda = args.device == "auto" and torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        if use_cuda:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        else:
            if torch.cuda.is_available():  # the stand-ins refuse to stand in for a device that is there
                raise ValueError("--device cpu on a machine with a GPU: hide it with CUDA_VISIBLE_DEVICES=''")
            from eaft_megatron.testing.cpu import cpu_standins

            stack.enter_context(cpu_standins())
            device = torch.device("cpu")
        if not dist.is_initialized():  # a caller that brings its own group keeps it
            dist.init_process_group(
                "nccl" if use_cuda else "gloo", timeout=datetime.timedelta(minutes=args.distributed_timeout_minutes)
            )
            # A gloo group alive at exit may abort the process.
            stack.callback(dist.destroy_process_group)
        from eaft_megatron.megatron_map import model_parallel_cuda_manual_seed, parallel_state

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        )
        stack.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(args.seed)
        yield device


def build_trainer(args: argparse.Namespace, device: torch.device, *, load_weights: bool) -> Trainer:
    """Model (with the Hugging Face weights, or not yet filled), megatron-core's Adam, and its schedule."""
    from eaft_megatron.megatron_map import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        Float16Module,
        OptimizerConfig,
        finalize_model_grads,
        get_megatron_optimizer,
    )

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config, chunks = _build_chunks(args, dtype)
    if load_weights:
        load_hf_weights(chunks, args.hf_model)
    chunks = [chunk.to(device) for chunk in chunks]
    if args.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    model = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(optimizer_config, model, **_no_decay_for_norms(optimizer_config))
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return Trainer(model, optimizer, _schedule(args, optimizer))


def _build_chunks(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, list[torch.nn.Module]]:
    from eaft_megatron.megatron_map import parallel_state

    hf_config = read_hf_config(args.hf_model)
    virtual = args.num_virtual_stages_per_pipeline_rank
    config = transformer_config(
        hf_config,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        params_dtype=dtype,
        calculate_per_token_loss=True,
        recompute_granularity=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
        # megatron-core interleaves two stages in this mode only
        **({"overlap_p2p_comm": True, "batch_p2p_comm": False} if virtual else {}),
    )
    chunks = []
    for stage in range(virtual or 1):
        where = {"ignore_virtual": False, "vp_stage": stage if virtual else None}
        chunks.append(
            build_model(
                hf_config,
                config,
                transformer_impl=choose_transformer_impl(args.transformer_impl),
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                vp_stage=where["vp_stage"],
                max_sequence_length=max(args.seq_length, hf_config.get("max_position_embeddings", 0)),
            )
        )
    return config, chunks


def _no_decay_for_norms(optimizer_config: Any) -> dict[str, Any]:
    """No weight decay on biases and norms, Megatron-LM's default; older releases do it unasked."""
    if not has("get_standard_config_overrides"):
        return {}
    from eaft_megatron.megatron_map import get_standard_config_overrides

    return {"config_overrides": get_standard_config_overrides(optimizer_config)}


def _schedule(args: argparse.Namespace, optimizer: Any) -> Any:
    """Learning rate over samples: linear warmup, then decay over the rest of ``--train-iters``."""
    from eaft_megatron.megatron_map import OptimizerParamScheduler

    total = args.train_iters * args.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=int(args.lr_warmup_fraction * args.train_iters) * args.global_batch_size,
        lr_decay_steps=total,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
