"""One training step and one evaluation, through megatron-core's own schedules."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.data.batches import collate, micro_batch_indices
from eaft_megatron.data.samples import PreparedDataset, block_diagonal_mask
from eaft_megatron.hooks import installed
from eaft_megatron.hooks.metrics import metric_names
from eaft_megatron.training.setup import Trainer

_LENGTH_MULTIPLE = 32  # samples are cut to the longest of the step, rounded up to this

_UNCHANGED = "The weights are as before this iteration; look at its data, the learning rate, the precision"

_OF_EVERY_SAMPLE = ("tokens", "labels", "loss_mask", "position_ids")  # anything else is a column for the loss

Batches = tuple[list[dict[str, Tensor]], int]
"""Micro-batches of one data-parallel rank, and their common length."""


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the per-token losses ``[b, s]``, number of tokens, and the report, as pretrain_gpt's does it."""
    total = (output_tensor.float() * loss_mask).sum()
    count = loss_mask.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """The forward_step_func of megatron-core's schedules."""
    batch = next(data_iterator)
    # Only packed samples have ids. Without them None will do: causal attention never looks at padding on the right.
    mask = block_diagonal_mask(batch["sequence_ids"]) if "sequence_ids" in batch else None
    if (hook := installed()) is not None:
        hook.side = {name: batch[name] for name in batch if name not in _OF_EVERY_SAMPLE}
    output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, batch["loss_mask"])


def training_batches(
    dataset: PreparedDataset, args: argparse.Namespace, consumed_samples: int, device: torch.device
) -> Batches:
    """This data-parallel rank's micro-batches of the step that starts after ``consumed_samples``."""
    from eaft_megatron.megatron_map import parallel_state

    def indices(rank: int) -> list[list[int]]:
        return micro_batch_indices(
            len(dataset),
            args.seed,
            consumed_samples,
            args.global_batch_size,
            args.micro_batch_size,
            rank,
            args.data_parallel_size,
        )

    every = [index for rank in range(args.data_parallel_size) for micro in indices(rank) for index in micro]
    length = dataset.padded_length(every, _LENGTH_MULTIPLE)
    return _load(dataset, indices(parallel_state.get_data_parallel_rank()), length, device), length


def evaluation_batches(dataset: PreparedDataset, args: argparse.Namespace, device: torch.device) -> Iterator[Batches]:
    """The first ``--eval-samples`` rows in steps of one global batch, short rows together; the last one is filled up
    with rows whose loss mask is 0."""
    from eaft_megatron.megatron_map import parallel_state

    count = min(args.eval_samples or len(dataset), len(dataset))
    order = sorted(range(count), key=dataset.sample_length)
    for begin in range(0, count, args.global_batch_size):
        filled = order[begin : begin + args.global_batch_size]
        length = dataset.padded_length(filled, _LENGTH_MULTIPLE)
        part: list[int | None] = [*filled, *[None] * (args.global_batch_size - len(filled))]
        rank_part = part[parallel_state.get_data_parallel_rank() :: args.data_parallel_size]
        size = args.micro_batch_size
        yield _load(dataset, [rank_part[i : i + size] for i in range(0, len(rank_part), size)], length, device), length


def run_schedule(
    trainer: Trainer, step: Callable, batches: Batches, args: argparse.Namespace, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Forward (and backward) over the micro-batches; the reports, on the last pipeline stage only."""
    from eaft_megatron.megatron_map import get_forward_backward_func

    micro_batches, length = batches
    chunks = trainer.model
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )


def train_step(trainer: Trainer, step: Callable, batches: Batches, args: argparse.Namespace, iteration: int) -> dict:
    """One optimizer step; returns the metrics, the same on every rank.

    Raises:
        FloatingPointError: on every rank, before the weights change: a loss or a gradient is not finite.
    """
    for chunk in trainer.model:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = run_schedule(trainer, step, batches, args, forward_only=False)
    metrics = reduce_reports(reports, iteration)
    norms = [buffer.grad_data.norm() for chunk in trainer.model for buffer in chunk.buffers]
    if ranks := _ranks_where(not all(bool(norm.isfinite()) for norm in norms)):
        raise FloatingPointError(f"iteration {iteration}: a gradient is not finite on rank(s) {ranks}. {_UNCHANGED}")
    learning_rate = trainer.optimizer.param_groups[0]["lr"]
    ok, grad_norm, _ = trainer.optimizer.step()
    assert ok, "only fp16 loss scaling skips a step"
    trainer.scheduler.step(increment=args.global_batch_size)
    return metrics | {"grad norm": grad_norm, "learning rate": learning_rate}


@torch.no_grad()
def evaluate(
    trainer: Trainer, step: Callable, dataset: PreparedDataset, args: argparse.Namespace, iteration: int, device
):
    """Metrics over a set's valid tokens, the same on every rank; training mode is restored."""
    for chunk in trainer.model:
        chunk.eval()
    reports = []
    for batches in evaluation_batches(dataset, args, device):
        reports += run_schedule(trainer, step, batches, args, forward_only=True)
    for chunk in trainer.model:
        chunk.train()
    return reduce_reports(reports, iteration)


def reduce_reports(reports: list[dict[str, Tensor]], iteration: int) -> dict[str, float]:
    """Means over valid tokens, micro-batches and data-parallel ranks, known to every rank; ``tokens`` is their number.

    Raises:
        FloatingPointError: on every rank: a cross entropy or loss is NaN or infinite; names the step and the ranks.
    """
    from eaft_megatron.megatron_map import parallel_state

    device = torch.device("cuda", torch.cuda.current_device())  # the CPU, under the stand-ins
    names = metric_names(installed())
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for report in reports:
        sums += torch.stack([report[name] for name in names]).double()
    if ranks := _ranks_where(not bool(sums[:2, 0].isfinite().all())):
        raise FloatingPointError(
            f"iteration {iteration}: the loss is not finite on rank(s) {ranks} of the last pipeline stage. {_UNCHANGED}"
        )
    # Every tensor-parallel rank of the last stage holds the same sums: one of them speaks.
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        sums.zero_()
    dist.all_reduce(sums)
    tokens = float(sums[0, 1])
    if tokens == 0:
        raise ValueError(f"iteration {iteration}: not one token of the batch is trained on")
    return dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True)) | {"tokens": tokens}


def _ranks_where(condition: bool) -> list[int]:
    """The ranks on which the condition holds, known to every rank: one all-reduce."""
    flags = torch.zeros(
        dist.get_world_size(), dtype=torch.int64, device=torch.device("cuda", torch.cuda.current_device())
    )
    flags[dist.get_rank()] = condition
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def _load(
    dataset: PreparedDataset, micro_batches: list[list[Any]], length: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Collated micro-batches on the device; None stands for a row that does not count."""
    loaded = []
    for indices in micro_batches:
        samples = [dataset[index if index is not None else 0] for index in indices]
        for sample, index in zip(samples, indices, strict=True):
            if index is None:
                sample["loss_mask"].zero_()
        batch = collate(samples, length)
        loaded.append({key: value.to(device) for key, value in batch.items()})
    return loaded
