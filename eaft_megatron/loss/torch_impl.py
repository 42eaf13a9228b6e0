"""The two passes over the logits in plain torch: statistics forward, gradient backward.

Both walk over small chunks of rows with one reused buffer, so that no copy of the whole logits ever exists and a
chunk stays in cache between the steps. Half-precision logits are widened in that buffer and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 32  # columns per block of the two-level top-K
_CHUNK_NUMBERS_CPU = 2 * 152064  # two rows of Qwen's vocabulary in float32, 1.2 MB: the passes over a chunk stay in L2
_CHUNK_NUMBERS_GPU = 1 << 26  # enough to fill a GPU: 256 MB of float32


Spans = list[tuple[int, int]]
"""Runs of rows, each from its first to before its last, ascending and apart from each other."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which columns of the true vocabulary this rank holds: ``start`` to ``start + width`` in global ids."""

    start: int
    width: int

    @classmethod
    def of(cls, rank: int, columns: int, vocab_size: int) -> Shard:
        """The shard of ``rank`` when every rank holds ``columns`` columns, those beyond ``vocab_size`` padding."""
        start = rank * columns
        return cls(start, min(max(vocab_size - start, 0), columns))

    def local_index(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """``(index, owned)``: the target's column here (0 where it is not here), and whether it is."""
        index = target - self.start
        owned = (index >= 0) & (index < self.width)
        return index.masked_fill(~owned, 0), owned


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def spans_of(valid: Tensor) -> Spans:
    """The runs of True in ``[N]`` bool. Looks at the values: a host sync on a GPU."""
    padded = torch.zeros(valid.shape[0] + 2, dtype=torch.bool, device=valid.device)
    padded[1:-1] = valid
    edges = (padded[1:] != padded[:-1]).nonzero().squeeze(1).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def local_statistics(
    rows: Tensor, target: Tensor, shard: Shard, k: int, *, spans: Spans | None = None, sum_squares: bool = False
) -> Tensor:
    """This rank's share of every token's statistics: one read of the logits.

    Args:
        rows: ``[N, V_local]`` logits; columns from ``shard.width`` on are never looked at.
        target: ``[M]`` int64 global ids of the rows looked at; an id outside the shard is not owned.
        shard: the columns held here.
        k: how many of the largest logits to return.
        spans: the rows to look at, M in all; None for all N.
        sum_squares: also return the sum of squared exponentials.

    Returns:
        ``[M, k + 2]`` (``k + 3``) in the compute dtype: the k largest logits in descending order, -inf where the
        shard has fewer; the sum of exponentials relative to the largest; the target's logit, -inf if not owned;
        then the sum of squared exponentials, relative to the largest too.
    """
    dtype, tokens = compute_dtype(rows), target.shape[0]
    packed = torch.full((tokens, k + 2 + sum_squares), float("-inf"), dtype=dtype, device=rows.device)
    if shard.width == 0:
        packed[:, k] = 0
        packed[:, k + 2 :] = 0
        return packed
    packed[:, k + 1] = _gather_owned(rows, target, shard, spans)
    for _, part, wide, buffer in _chunks(rows[:, : shard.width], spans):
        out = packed[part]
        largest = _largest(wide, min(k, shard.width))
        out[:, : largest.shape[1]] = largest
        exponentials = torch.sub(wide, _finite_shift(largest[:, :1]), out=buffer).exp_()
        out[:, k] = exponentials.sum(dim=1)
        if sum_squares:
            out[:, k + 2] = exponentials.square_().sum(dim=1)
    return packed


def local_topk(rows: Tensor, shard: Shard, k: int) -> Tensor:
    """The first k columns of :func:`local_statistics` alone: ``[N, k]``, -inf where the shard has fewer columns."""
    largest = torch.full((rows.shape[0], k), float("-inf"), dtype=compute_dtype(rows), device=rows.device)
    width = min(k, shard.width)
    if width:
        rows = rows[:, : shard.width]
        step = _chunk_height(rows)
        for begin in range(0, rows.shape[0], step):
            largest[begin : begin + step, :width] = _largest(rows[begin : begin + step], width)
    return largest


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
    dtype, height, done = compute_dtype(rows), _chunk_height(rows), 0
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
        looked_at = [torch.arange(first, last, device=rows.device) for first, last in spans]
        logit = rows[torch.cat(looked_at or [index]), index]
    return logit.to(compute_dtype(rows)).masked_fill(~owned, float("-inf"))


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
