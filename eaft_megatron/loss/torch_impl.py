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

_LOG2E = 1.4426950216293335  # log2(e) as a float32 holds it
_LARGEST_SHIFT = 2e38  # times log2(e) it is still a finite float32
_BLOCK = 32  # at least so many columns in a block of the two-level top-K
_BLOCKS_STEP = 64  # the number of blocks is a multiple of this
_MANY_ROWS = 8  # of a chunk: from here on, small operations on all of them cost less than a long top-K of each
_CHUNK_NUMBERS_CPU = 2 * 152064  # two rows of Qwen's vocabulary in float32, 1.2 MB: the passes over a chunk stay in L2
_CHUNK_NUMBERS_GPU = 1 << 26  # enough to fill a GPU: 256 MB of float32


def local_statistics(rows: Tensor, target: Tensor, plan: Plan, *, keep: Tensor | None = None) -> Message:
    """This rank's share of every token's statistics: one read of the logits.

    Args:
        rows: ``[N, V_local]`` logits; columns from ``plan.shard.width`` on are never looked at.
        target: ``[M]`` int64 global ids of the rows looked at; an id outside the shard is not owned.
        plan: the checked arguments.
        keep: ``[M]`` ascending indices of the rows to look at; None for all N.
    """
    width = plan.shard.width
    message = Message.empty(target.shape[0], plan.k_local, 1 + plan.sum_squares, rows.dtype, rows.device)
    topk, sums = message.topk.fill_(float("-inf")), message.sums.zero_()
    message.target_logit.copy_(_gather_owned(rows, target, plan.shard, keep))
    if width == 0:
        return message
    for _, part, wide, buffer in _chunks(rows[:, :width], keep):
        largest = _largest(wide, min(plan.k_local, width))
        topk[part, : largest.shape[1]] = largest
        exponentials, factor = _exponentials(wide, _finite_shift(largest[:, :1]), buffer)
        sums[0, part] = exponentials.sum(dim=1) * factor
        if plan.sum_squares:
            sums[1, part] = exponentials.square_().sum(dim=1) * factor * factor
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
    keep: Tensor | None = None,
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
        keep: ``[M]`` ascending indices of the rows looked at; the others get zero. None for all N.
    """
    out[:, shard.width :].zero_()
    if shard.width == 0:
        return
    rows, out = rows[:, : shard.width], out[:, : shard.width]
    index, owned = shard.local_index(target)
    index, onehot = index.unsqueeze(1), torch.where(owned, -slope, 0).unsqueeze(1)
    dead = (slope == 0).unsqueeze(1)
    shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    for where, part, wide, buffer in _chunks(rows, keep):
        direct = isinstance(where, slice) and out.dtype == shift.dtype
        gradient, factor = _exponentials(wide, shift[part], out[where] if direct else buffer)
        gradient.mul_(scale[part] * factor.unsqueeze(1)).scatter_add_(1, index[part], onehot[part])
        if not _may_look_at(dead) or bool(dead[part].any()):
            gradient.masked_fill_(dead[part], 0)
        if isinstance(where, Tensor):
            out.index_copy_(0, where, gradient.to(out.dtype))
        elif not direct:
            out[where] = gradient
    if keep is not None:
        left_out = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        left_out[keep] = False
        out.index_fill_(0, left_out.nonzero().squeeze(1), 0)


def _chunks(rows: Tensor, keep: Tensor | None) -> Iterator[tuple[slice | Tensor, slice, Tensor, Tensor]]:
    """Some of the rows to look at, a chunk at a time: ``(which of all N, which of the M, values, scratch)``.

    The values are in the compute dtype: the logits themselves, only to be read, or a copy of them in the scratch. Rows
    that do not follow each other are copied together: with every second token ignored, single rows would be slower.
    """
    dtype, height = compute_dtype(rows.dtype), _chunk_height(rows)
    where: slice | Tensor
    buffer = torch.empty((height, rows.shape[1]), dtype=dtype, device=rows.device)
    total = rows.shape[0] if keep is None else keep.shape[0]
    numbers = range(total) if keep is None else keep.tolist()
    for begin in range(0, total, height):
        part = slice(begin, min(begin + height, total))
        first, last, scratch = numbers[begin], numbers[part.stop - 1], buffer[: part.stop - begin]
        if keep is None or last - first == part.stop - 1 - begin:
            where = slice(first, last + 1)
            wide = rows[where] if rows.dtype == dtype else scratch.copy_(rows[where])
        else:
            where = keep[part]
            wide = (
                torch.index_select(rows, 0, where, out=scratch) if rows.dtype == dtype else scratch.copy_(rows[where])
            )
        yield where, part, wide, scratch


def _may_look_at(values: Tensor) -> bool:
    """Whether reading a number on the host costs nothing: on a GPU it would stall the stream."""
    return values.device.type == "cpu"


def _chunk_height(rows: Tensor) -> int:
    numbers = _CHUNK_NUMBERS_CPU if rows.device.type == "cpu" else _CHUNK_NUMBERS_GPU
    return min(max(numbers // rows.shape[1], 1), max(rows.shape[0], 1))


def _exponentials(x: Tensor, shift: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """``(values [n, V] in out, factor [n])``, with ``exp(x - shift) = factor * values``; ``shift`` is ``[n, 1]``.

    float32 on the CPU goes by way of exp2, a fifth of the time of exp on an AMD EPYC. Its argument is made in one pass:
    ``x log2(e) + offset``, a fused multiply-add there, is rounded once and at the size of the result. What the offset
    lost when it was rounded itself is the factor.
    """
    if x.dtype != torch.float32 or not _may_look_at(shift) or not bool(shift.abs().amax() < _LARGEST_SHIFT):
        return torch.sub(x, shift, out=out).exp_(), torch.ones_like(shift[:, 0])
    exact = shift.double() * -_LOG2E
    offset = exact.float()
    values = torch.add(offset, x, alpha=_LOG2E, out=out).exp2_()
    return values, exact.sub_(offset).exp2_().float()[:, 0]


def _finite_shift(largest: Tensor) -> Tensor:
    """The row maximum, or 0 where it is -inf: -inf minus -inf would be NaN, and such a row's sum is 0."""
    return largest.masked_fill(largest == float("-inf"), 0)


def _gather_owned(rows: Tensor, target: Tensor, shard: Shard, keep: Tensor | None) -> Tensor:
    """``[M]``: the target's logit where this shard holds it, else -inf."""
    index, owned = shard.local_index(target)
    logit = rows.gather(1, index.unsqueeze(1)).squeeze(1) if keep is None else rows[keep, index]
    return logit.masked_fill(~owned, float("-inf"))


def _largest(rows: Tensor, k: int) -> Tensor:
    """The k largest of each row in descending order, NaN first, as ``rows.topk(k)`` has them but several times faster.

    Two levels: if a value belongs to the top K, fewer than K blocks can have a larger maximum, so the K blocks with
    the largest maxima hold all of the top K (as a multiset: which of several equal values is kept does not matter).
    """
    height, width = rows.shape
    # Block b holds columns b, b + blocks, b + 2 blocks, ...: maxima of strided blocks vectorise over contiguous
    # columns, best over a multiple of 64 of them, and any partition of the columns will do.
    many = height >= _MANY_ROWS and rows.device.type == "cpu"
    blocks = width // (_BLOCK if many else 2 * _BLOCK) // _BLOCKS_STEP * _BLOCKS_STEP
    if blocks <= 2 * k:
        return rows.topk(k, dim=1).values
    size = width // blocks
    body = rows[:, : blocks * size].unflatten(1, (size, blocks))
    maxima, best = body.amax(dim=1).topk(k, dim=1, sorted=False)
    candidates = body.gather(2, best.unsqueeze(1).expand(height, size, k)).flatten(1)
    candidates = torch.cat([candidates, rows[:, blocks * size :]], dim=1)
    if many:
        candidates = _not_below(candidates, maxima.amin(dim=1, keepdim=True))
    return candidates.topk(k, dim=1).values


def _not_below(x: Tensor, limit: Tensor) -> Tensor:
    """The values of each row that are not below its limit, in as few columns as will do, filled up with -inf."""
    row, column = (~(x < limit)).nonzero().unbind(1)  # NaN is below nothing
    counts = torch.bincount(row, minlength=x.shape[0])
    place = torch.arange(row.shape[0], device=x.device) - (counts.cumsum(0) - counts)[row]
    out = x.new_full((x.shape[0], int(counts.max())), float("-inf"))
    out[row, place] = x[row, column]
    return out
