"""A tiny random GPT on megatron-core, and what it takes to train it: groups, weights, batches, steps.

The same (seed, step) gives the same global weights and the same global batch whatever the parallel sizes, so losses
can be compared across them. Works on CUDA, and on CPU within `cpu_standins()`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from eaft_megatron.megatron_map import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    GPTModel,
    OptimizerConfig,
    TransformerConfig,
    destroy_rerun_state_machine,
    finalize_model_grads,
    get_forward_backward_func,
    get_gpt_layer_local_spec,
    get_megatron_optimizer,
    has,
    model_parallel_cuda_manual_seed,
    parallel_state,
    stage_argument,
)

VOCAB_SIZE = 96
SEQ_LENGTH = 24


@contextlib.contextmanager
def model_parallel(tp: int = 1, pp: int = 1, vpp: int | None = None, seed: int = 1) -> Iterator[None]:
    """megatron-core's process groups over the initialised world (data parallel: what tp x pp leaves), then no more."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp
    )
    model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        destroy_rerun_state_machine()
        parallel_state.destroy_global_memory_buffer()
        parallel_state.destroy_model_parallel()
        # It forgets these two, and 0.12 then takes a later layout's middle stage for an end that holds embeddings.
        parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None


def tiny_config(**overrides: Any) -> TransformerConfig:
    """Four layers, grouped queries, SwiGLU, RMSNorm, no dropout; parallel sizes as `model_parallel` was given.

    The loss is a sum over tokens, divided once by the global number of tokens (calculate_per_token_loss).
    """
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    values: dict[str, Any] = dict(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        # megatron-core interleaves over two stages in this mode only.
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
        pipeline_dtype=overrides.get("params_dtype", torch.float32) if pp > 1 else None,
        deallocate_pipeline_outputs=True,  # as Megatron-LM's scripts do
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
    )
    return TransformerConfig(**{**values, **overrides})


def build_tiny_gpt(
    config: TransformerConfig, *, seed: int = 1, share_embeddings: bool = False, vocab_size: int = VOCAB_SIZE
) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual stage), with the weights of `fill_weights`."""
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp or 1):
        where = stage_argument(GPTModel, stage) if vpp else {}
        ends = {"ignore_virtual": False, **where}
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization=config.normalization),
            vocab_size=vocab_size,
            max_sequence_length=SEQ_LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            share_embeddings_and_output_weights=share_embeddings,
            position_embedding_type="rope",
            **where,
        )
        fill_weights(chunk, seed)
        chunks.append(chunk)
    return chunks


def fill_weights(model: GPTModel, seed: int = 1) -> None:
    """Overwrite every weight by this rank's slice of a full one drawn from (seed, name): equal for all layouts."""
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:  # local layer number -> global
            at = parts.index("layers") + 1
            parts[at] = str(model.decoder.layers[int(parts[at])].layer_number - 1)
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            parts = ["embedding", "word_embeddings", "weight"]
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        shape = [size * tp if d == dim else size for d, size in enumerate(parameter.shape)]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {'.'.join(parts)}".encode()))
        full = torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        if dim is not None and "linear_fc1" in parts and model.config.gated_linear_unit:
            # Gate and up lie one after the other on each rank, so each is sliced by itself.
            full = torch.cat([half.chunk(tp, dim)[rank] for half in full.chunk(2, dim)], dim)
        elif dim is not None:
            full = full.chunk(tp, dim)[rank]
        with torch.no_grad():
            parameter.copy_(full)


def with_optimizer(
    chunks: list[GPTModel], *, distributed: bool = False, lr: float = 1e-3, overlap: bool = False
) -> tuple[list[DistributedDataParallel], Any]:
    """(the chunks wrapped for data parallelism, megatron-core's Adam), ready for `train_step`."""
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=overlap)
    model = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    half = config.params_dtype if config.params_dtype is not torch.float32 else None
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            clip_grad=1.0,
            bf16=half is torch.bfloat16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        model,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap:  # gradients are reduced as the last micro-batch's come, not earlier ones'
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    return model, optimizer


def global_batch(
    step: int, *, samples: int = 8, seed: int = 1, vocab_size: int = VOCAB_SIZE, seq_length: int = SEQ_LENGTH
) -> dict[str, torch.Tensor]:
    """Random tokens and labels, positions, and loss masks of unequal length; each [samples, seq_length], on CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    tokens = torch.randint(vocab_size, (samples, seq_length + 1), generator=generator)
    kept = torch.randint(1, seq_length + 1, (samples, 1), generator=generator)
    positions = torch.arange(seq_length).expand(samples, seq_length).contiguous()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (positions < kept).float(),
        "position_ids": positions,
    }


def micro_batches(batch: dict[str, torch.Tensor], micro_batch_size: int = 1) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's share of a global batch, in order; each tensor [micro_batch_size, seq_length]."""
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rank_batch = {key: value.chunk(dp)[rank] for key, value in batch.items()}
    split = {key: value.split(micro_batch_size) for key, value in rank_batch.items()}
    return [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]


def masked_sum(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(loss sum, token count, report) of per-token losses [b, s], as pretrain_gpt's loss function returns them."""
    total, count = (losses.float() * loss_mask).sum(), loss_mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator: Iterator[dict], model: Any) -> tuple[torch.Tensor, partial]:
    """The forward_step_func for megatron-core's schedules."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in next(data_iterator).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(masked_sum, batch["loss_mask"])


def train_step(model: list, optimizer: Any, batch: dict[str, torch.Tensor], **options: Any) -> tuple[float, float]:
    """One step on a global batch through megatron-core's own schedule.

    Returns (the mean loss over the batch's tokens, the gradient norm), the same on every rank.
    """
    step = options.pop("forward_step", forward_step)
    micro = micro_batches(batch, options.pop("micro_batch_size", 1))
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro) for _ in model] if len(model) > 1 else iter(micro),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(micro),
        seq_length=micro[0]["tokens"].shape[1],
        micro_batch_size=micro[0]["tokens"].shape[0],
        forward_only=False,
    )
    ok, grad_norm, _ = optimizer.step()
    assert ok, "the optimizer skipped the step"
    return mean_loss(reports), float(grad_norm)


def mean_loss(reports: list[dict[str, torch.Tensor]]) -> float:
    """Sum of losses over count of tokens, over micro-batches and data parallel, from the last stage to every rank."""
    device = torch.cuda.current_device()
    total = sum((report["lm loss"].to(device) for report in reports), torch.zeros(2, device=device))
    # Every tensor-parallel rank of the last stage holds the same sums; other stages hold zero.
    dist.all_reduce(total)
    return float(total[0] / total[1])


def sharded_state(model: list, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """The sharded state dict of weights and optimizer, for dist_checkpointing.save, and as the template for load."""
    names = ["model"] if len(model) == 1 else [f"model{stage}" for stage in range(len(model))]
    state = {name: chunk.module.sharded_state_dict() for name, chunk in zip(names, model, strict=True)}
    # From 0.15 on there is a format of this name; the default one cannot even be saved with 0.16.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    known = has("DistributedOptimizer.checkpoint_fully_reshardable_formats")
    state["optimizer"] = optimizer.sharded_state_dict(
        state, is_loading=loading, **({"metadata": metadata} if known else {})
    )
    return state


def load_sharded_state(model: list, optimizer: Any, state: dict[str, Any]) -> None:
    """Put what dist_checkpointing.load returned for `sharded_state(..., loading=True)` into place."""
    for stage, chunk in enumerate(model):
        chunk.module.load_state_dict(state["model" if len(model) == 1 else f"model{stage}"])
    optimizer.load_state_dict(state["optimizer"])
