"""The passes over the logits as Triton kernels; imported only once they are chosen, see implementation.py.

No value is looked at on the host, and rows of ignored tokens are skipped on the device without knowing their number.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from eaft_megatron.loss.exchange import Message, Statistics
from eaft_megatron.loss.kernels.gradient import launch_gradient
from eaft_megatron.loss.kernels.merging import launch_merge
from eaft_megatron.loss.kernels.statistics import launch_statistics
from eaft_megatron.loss.kernels.tuning import stream_shape
from eaft_megatron.loss.plan import Plan


def local_statistics(rows: Tensor, target: Tensor | None, plan: Plan) -> Message:
    """This rank's share of every token's statistics: one read of the logits, written as it will be sent.

    Args:
        rows: ``[N, V_local]`` bf16, fp16 or fp32.
        target: ``[N]`` int64 global ids; ignored rows are not read and hold zeros. None: the k largest logits alone.
        plan: the checked arguments; ``k_local`` at most 128.
    """
    rows = _with_contiguous_columns(rows)
    sum_count = 0 if target is None else 1 + plan.sum_squares
    message = Message.empty(rows.shape[0], plan.k_local, sum_count, rows.dtype, rows.device)
    with _device_of(rows):
        launch_statistics(
            rows,
            target,
            message.logits,
            message.sums if sum_count else None,
            start=plan.shard.start,
            width=plan.shard.width,
            k=plan.k_local,
            ignore_index=plan.ignore_index,
            shape=stream_shape(plan.k_local, rows.dtype),
        )
    return message


def merge_packed(gathered: Message, target: Tensor, plan: Plan) -> Statistics:
    """The whole vocabulary's numbers of each token, from every rank's message: bitwise equal on every rank.

    Ignored tokens hold 0 (1 as ``sum_exp``).
    """
    statistics = Statistics.empty(target, torch.float32, plan)
    with _device_of(target):
        launch_merge(
            gathered.logits,
            gathered.sums,
            target,
            **statistics._asdict(),
            k_local=gathered.k,
            k=plan.k,
            vocab_size=plan.vocab_size,
            ignore_index=plan.ignore_index,
        )
    return statistics


def merge_entropy(gathered: Message, k: int) -> Tensor:
    """``[N]`` entropy in nats of the k largest logits of the whole vocabulary; the bits of ``entropy`` above."""
    entropy = torch.empty(gathered.tokens, dtype=torch.float32, device=gathered.buffer.device)
    with _device_of(entropy):
        launch_merge(gathered.logits, None, None, entropy=entropy, k_local=gathered.k, k=k)
    return entropy


def write_gradient(
    rows: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    slope: Tensor,
    upstream: Tensor,
    plan: Plan,
    out: Tensor,
) -> None:
    """``upstream * slope * (softmax - onehot)`` into ``out``, which may be ``rows``: one read, one write."""
    written = _with_contiguous_columns(out)
    with _device_of(rows):
        launch_gradient(
            _with_contiguous_columns(rows),
            target,
            maximum,
            sum_exp,
            slope.contiguous(),
            upstream.contiguous(),
            written,
            start=plan.shard.start,
            width=plan.shard.width,
            ignore_index=plan.ignore_index,
        )
    if written is not out:
        out.copy_(written)
    # A kernel's writes are unknown to autograd, which would go on to use what the logits no longer hold.
    torch.autograd.graph.increment_version(out)


def _with_contiguous_columns(rows: Tensor) -> Tensor:
    """The kernels take any row stride; a transposed vocabulary, which nobody has, costs a copy."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
