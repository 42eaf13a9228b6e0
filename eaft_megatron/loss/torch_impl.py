"""The two passes over the logits in plain torch: statistics forward, gradient backward.

Both walk over small chunks of rows with one reused buffer, so that no copy of the whole logits ever exists and a
chunk stays in cache between the steps. Half-precision logits are widened in that buffer and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eaft_megatron.loss.exchange import Message, compute_dtype
from eaft_megatron.loss.plan import Plan, Shard

_BLOCK = 32  # columns per block of the two-level top-K
_CHUNK_NUMBERS_CPU = 2 * 152064  # two rows of Qwen's vocabulary in float32, 1.2 MB: the passes over a chunk stay in L2
_CHUNK_NUMBERS_GPU = 1 << 26  # enough to fill a GPU: 256 MB of float32


Spans = list[tuple[int, int]]
"""Runs of rows, each from its first to before its last, ascending and apart from each other."""


def spans_of(valid: Tensor) -> Spans:
    """The runs of True in ``[N]`` bool. Looks at the values: a host sync on a GPU."""
    padded = torch.zeros(valid.shape[0] + 2, dtype=torch.bool, device=valid.device)
    padded[1:-1] = valid
    edges = (padded[1:] != padded[:-1]).nonzero().squeeze(1).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def local_statistics(rows: Tensor, target: Tensor, plan: Plan, *, spans: Spans | None = None) -> Message:
    """This rank's share of every token's statistics: one read of the logits.

    Args:
        rows: ``[N, V_local]`` logits; columns from ``plan.shard.width`` on are never looked at.
        target: ``[M]`` int64 global ids of the rows looked at; an id outside the shard is not owned.
        plan: the checked arguments.
        spans: the rows to look at, M in all; None for all N.
    """
    width = plan.shard.width
    message = Message.empty(target.shape[0], plan.k_local, 1 + plan.sum_squares, rows.dtype, rows.device)
    topk, sums = message.topk.fill_(float("-inf")), message.sums.zero_()
    message.target_logit.copy_(_gather_owned(rows, target, plan.shard, spans))
    if width == 0:
        return message
    for _, part, wide, buffer in _chunks(rows[:, :width], spans):
        largest = _largest(wide, min(plan.k_local, width))
        topk[part, : largest.shape[1]] = largest
        exponentials = torch.sub(wide, _finite_shift(largest[:, :1]), out=buffer).exp_()
        sums[0, part] = exponentials.sum(dim=1)
        if plan.sum_squares:
            sums[1, part] = exponentials.square_().sum(dim=1)
    return message


def local_topk(rows: Tensor, plan: Plan) -> Message:
    """The k largest of :func:`local_statistics` alone, in a message without sums."""
    message = Message.empty(rows.shape[0], plan.k_local, 0, rows.dtype, rows.device)
    topk, width = message.topk.fill_(float("-inf")), plan.shard.width
    k = min(plan.k_local, width)
    if k:
        step = _chunk_height(rows[:, :width])
        for begin in range(0, rows.shape[0], step):
            topk[begin : begin + step, :k] = _largest(rows[begin : begin + step, :width], k)
    return message


def write_gradient(
    rows: Tensor,
    target: Tensor,
    shift: Tensor,
    scale: Tensor,
    slope: Tensor,
    shard: Shard,
    out: Tensor,
    *,
    spans: Spans | None = None,
) -> None:
    """Gradient of ``sum(slope * ce)``, ``slope * (softmax - onehot)``: one read of the logits and one write.

    Args:
        rows: ``[N, V_local]`` logits.
        target: ``[M]`` int64 global ids of the rows looked at.
        shift: ``[M]`` the global maximum of each row.
        scale: ``[M]`` slope / (sum of exponentials relative to that maximum).
        slope: ``[M]`` gradient of the objective with respect to each token's cross entropy. Where it is zero the
            row's gradient is exactly zero, whatever the logits hold.
        shard: the columns held here; the others get zero.
        out: ``[N, V_local]`` in the logits' dtype; may be ``rows`` itself.
        spans: the rows looked at, M in all; the others get zero. None for all N.
    """
    out[:, shard.width :].zero_()
    if shard.width == 0:
        return
    rows, out = rows[:, : shard.width], out[:, : shard.width]
    index, owned = shard.local_index(target)
    index, onehot = index.unsqueeze(1), torch.where(owned, -slope, 0).unsqueeze(1)
    dead = (slope == 0).unsqueeze(1)
    shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    for where, part, wide, buffer in _chunks(rows, spans):
        gradient = torch.sub(wide, shift[part], out=out[where] if out.dtype == shift.dtype else buffer)
        gradient.exp_().mul_(scale[part]).scatter_add_(1, index[part], onehot[part])
        if out.device.type != "cpu" or bool(dead[part].any()):  # on a GPU, looking would stall the stream
            gradient.masked_fill_(dead[part], 0)
        if out.dtype != gradient.dtype:
            out[where] = gradient
    if spans is not None:
        edges = [0, *(edge for span in spans for edge in span), out.shape[0]]
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            out[begin:end].zero_()


def _chunks(rows: Tensor, spans: Spans | None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The rows of the spans, a chunk at a time: ``(which of all rows, which of the rows looked at, values, scratch)``.

    The values are in the compute dtype: the logits themselves, only to be read, or a copy of them in the scratch.
    """
    dtype, height, done = compute_dtype(rows.dtype), _chunk_height(rows), 0
    buffer = torch.empty((height, rows.shape[1]), dtype=dtype, device=rows.device)
    for first, last in spans if spans is not None else [(0, rows.shape[0])]:
        for begin in range(first, last, height):
            where = slice(begin, min(begin + height, last))
            size = where.stop - begin
            scratch = buffer[:size]
            wide = rows[where] if rows.dtype == dtype else scratch.copy_(rows[where])
            yield where, slice(done, done + size), wide, scratch
            done += size


def _chunk_height(rows: Tensor) -> int:
    numbers = _CHUNK_NUMBERS_CPU if rows.device.type == "cpu" else _CHUNK_NUMBERS_GPU
    return min(max(numbers // rows.shape[1], 1), max(rows.shape[0], 1))


def _finite_shift(largest: Tensor) -> Tensor:
    """The row maximum, or 0 where it is -inf: -inf minus -inf would be NaN, and such a row's sum is 0."""
    return largest.masked_fill(largest == float("-inf"), 0)


def _gather_owned(rows: Tensor, target: Tensor, shard: Shard, spans: Spans | None) -> Tensor:
    """``[M]``: the target's logit where this shard holds it, else -inf."""
    index, owned = shard.local_index(target)
    if spans is None:
        logit = rows.gather(1, index.unsqueeze(1)).squeeze(1)
    else:
        numbers = [torch.arange(first, last, device=rows.device) for first, last in spans]
        logit = rows[torch.cat(numbers or [index]), index]
    return logit.masked_fill(~owned, float("-inf"))


def _largest(rows: Tensor, k: int) -> Tensor:
    """The k largest of each row in descending order, NaN first, as ``rows.topk(k)`` has them but several times faster.

    Two levels: if a value belongs to the top K, fewer than K blocks can have a larger maximum, so the K blocks with
    the largest maxima hold all of the top K (as a multiset: which of several equal values is kept does not matter).
    """
    height, width = rows.shape
    blocks = width // _BLOCK
    if blocks <= 2 * k:
        return rows.topk(k, dim=1).values
    # Block b holds columns b, b + blocks, b + 2 blocks, ...: maxima of strided blocks vectorise over
    # contiguous columns, and any partition of the columns will do.
    body = rows[:, : blocks * _BLOCK].unflatten(1, (_BLOCK, blocks))
    best = body.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = body.gather(2, best.unsqueeze(1).expand(height, _BLOCK, k)).flatten(1)
    return torch.cat([candidates, rows[:, blocks * _BLOCK :]], dim=1).topk(k, dim=1).values
