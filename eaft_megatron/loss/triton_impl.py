"""The passes over the logits as Triton kernels; imported only once they are chosen, see implementation.py.

No value is looked at on the host, and rows of ignored tokens are skipped on the device without knowing their number.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.kernels.gradient import launch_gradient
from eaft_megatron.loss.kernels.merging import launch_merge
from eaft_megatron.loss.kernels.statistics import launch_statistics
from eaft_megatron.loss.kernels.tuning import stream_shape
from eaft_megatron.loss.message import Message
from eaft_megatron.loss.torch_impl import Shard


def local_message(
    rows: Tensor,
    target: Tensor | None,
    shard: Shard,
    k: int,
    *,
    ignore_index: int = -100,
    sum_squares: bool = False,
) -> Message:
    """This rank's share of every token's statistics: one read of the logits, written as it will be sent.

    Args:
        rows: ``[N, V_local]`` bf16, fp16 or fp32.
        target: ``[N]`` int64 global ids; ignored rows are not read and hold zeros. None: the k largest logits alone.
        shard: the columns held here.
        k: how many of the largest logits to return, at most 128.
        ignore_index: see ``target``.
        sum_squares: also return the sum of squared exponentials.
    """
    rows = _with_contiguous_columns(rows)
    with_target = target is not None
    message = Message.empty(rows.shape[0], k + with_target, with_target * (1 + sum_squares), rows.dtype, rows.device)
    with _device_of(rows):
        launch_statistics(
            rows,
            target,
            message.values,
            message.sums if with_target else None,
            start=shard.start,
            width=shard.width,
            k=k,
            ignore_index=ignore_index,
            shape=stream_shape(k, rows.dtype),
        )
    return message


def merge_message(
    gathered: Message,
    target: Tensor,
    *,
    k_local: int,
    k: int,
    vocab_size: int,
    ignore_index: int,
    entropy: bool,
) -> dict[str, Tensor]:
    """The whole vocabulary's numbers of each token, from every rank's message: bitwise equal on every rank.

    Returns:
        ``[N]`` float32 by name: "maximum", "sum_exp" (relative to it), "ce", "entropy" (nats) if asked for, and
        "sum_p_squared" if the message has it. Ignored tokens hold 0 (1 as "sum_exp"); a target outside the vocabulary
        gives a NaN "ce".
    """
    names = ["maximum", "sum_exp", "ce"] + ["entropy"] * entropy + ["sum_p_squared"] * (gathered.rows > 1)
    out = {name: torch.empty(gathered.tokens, dtype=torch.float32, device=target.device) for name in names}
    with _device_of(target):
        launch_merge(
            gathered.values,
            gathered.sums,
            target,
            out,
            k_local=k_local,
            k=k,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
        )
    return out


def topk_entropy(rows: Tensor, shard: Shard, k_local: int, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """``[N]`` entropy in nats of the k largest logits of the whole vocabulary; the bits of "entropy" above."""
    gathered = local_message(rows, None, shard, k_local).gather(group)
    entropy = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    with _device_of(rows):
        launch_merge(
            gathered.values, None, None, {"entropy": entropy}, k_local=k_local, k=k, vocab_size=0, ignore_index=0
        )
    return entropy


def write_gradient(
    rows: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    slope: Tensor,
    upstream: Tensor,
    shard: Shard,
    out: Tensor,
    ignore_index: int = -100,
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
            start=shard.start,
            width=shard.width,
            ignore_index=ignore_index,
        )
    if written is not out:
        out.copy_(written)


def _with_contiguous_columns(rows: Tensor) -> Tensor:
    """The kernels take any row stride; a transposed vocabulary, which nobody has, costs a copy."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _device_of(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
