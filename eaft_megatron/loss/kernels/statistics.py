"""One read of the logits: exact top-K, online sum of exponentials and the target's logit of every row.

One program, of one warp, walks over one row; there is no shared state and no barrier. The row is cut into groups of
contiguous columns, one 16-byte load each, dealt out to BUCKETS buckets in turn. A bucket keeps its sum of exponentials
relative to its own maximum and its three largest *group maxima*, with the step at which each came.

Names, each a vector over the buckets:
    p1 >= p2 >= p3  its three largest group maxima
    s1, s2, s3      the steps (tiles of BUCKETS x GROUP columns) at which they came
    g1, g2, g3      the same as numbers of groups in the row, ``step * BUCKETS + bucket``

A row may begin anywhere. Columns are counted from the last 16-byte boundary before it, ``lead`` columns earlier: what
lies there, and behind ``end`` up to the next boundary, is read and taken for -inf. A 16-byte block that holds a byte of
the row lies in the same page, so no such read can fault.

Then:

1. The K groups with the largest maxima that were kept are read again, 0.2% of a row; their K largest values are the
   candidates. All kept maxima above the K-th candidate belong to these K groups.
2. A bucket can have lost a value above the K-th candidate only if its third group maximum is above it, too; that holds
   for at most (K - 1) / 3 buckets, whatever the data, and usually for none. Their columns are read again and merged.

So the result is exact for any data, ties included, and the work is bounded. In the code compiled for sm_90 the loop
over the tiles takes 9.8 instructions of a lane per bf16 element, 11.4 per fp32 element (Triton 3.9, K = 20; held below
13 and 26 by tests/loss/test_kernels_compiled.py).
"""

import torch
import triton
import triton.language as tl

from eaft_megatron.loss.kernels.arithmetic import (
    KEY_OF_MINUS_INF,
    LOG2E,
    LOWEST,
    MINUS_INF,
    align_down,
    from_key,
    largest_keys,
    to_key,
)
from eaft_megatron.loss.kernels.tuning import StreamShape


@triton.jit
def _consume(x, step, total, squares, p1, p2, p3, s1, s2, s3, TRACK: tl.constexpr, SQUARES: tl.constexpr):
    """Take one tile [BUCKETS, GROUP] into the buckets' state. A NaN reaches ``total`` and nothing else."""
    x = x.to(tl.float32)
    top = tl.max(x, axis=1)
    before = tl.maximum(p1, LOWEST)  # -inf minus -inf would be NaN
    first = top > p1
    if TRACK:
        second = top > p2
        third = top > p3
        p3 = tl.where(second, p2, tl.where(third, top, p3))
        s3 = tl.where(second, s2, tl.where(third, step, s3))
        p2 = tl.where(first, p1, tl.where(second, top, p2))
        s2 = tl.where(first, s1, tl.where(second, step, s2))
        s1 = tl.where(first, step, s1)
    p1 = tl.where(first, top, p1)
    after = tl.maximum(p1, LOWEST)
    # The difference first: x log2(e) - max log2(e) in one operation would round at the size of x, not of the result.
    e = tl.exp2((x - after[:, None]) * LOG2E)
    rescale = tl.exp2((before - after) * LOG2E)
    total = total * rescale + tl.sum(e, axis=1)
    if SQUARES:
        squares = squares * (rescale * rescale) + tl.sum(e * e, axis=1)
    return total, squares, p1, p2, p3, s1, s2, s3


@triton.jit
def _load_groups(aligned, group, keep, lane, lead, end, readable, GROUP: tl.constexpr):
    """Keys of some groups' columns, [groups, GROUP]; -inf where a group is not to be kept or a column not the row's."""
    columns = group[:, None] * GROUP + lane[None, :]
    x = tl.load(aligned + columns, mask=keep[:, None] & (columns < readable), other=MINUS_INF).to(tl.float32)
    return to_key(tl.where(keep[:, None] & (columns >= lead) & (columns < end), x, MINUS_INF))


@triton.jit
def _largest_groups(p1, p2, p3, g1, g2, g3, bucket, K: tl.constexpr, KPAD: tl.constexpr):
    """Ids of the K groups with the largest of the kept maxima; -1 where there are fewer."""
    place = tl.arange(0, KPAD)
    groups = tl.full([KPAD], -1, tl.int32)
    for k in range(K):
        best = tl.max(p1, axis=0)
        chosen = tl.min(tl.where(p1 == best, g1, 0x7FFFFFFF), axis=0)
        groups = tl.where((place == k) & (best > KEY_OF_MINUS_INF), chosen, groups)
        hit = g1 == chosen
        p1 = tl.where(hit, p2, p1)
        g1 = tl.where(hit, g2, g1)
        p2 = tl.where(hit, p3, p2)
        g2 = tl.where(hit, g3, g2)
        p3 = tl.where(hit, KEY_OF_MINUS_INF, p3)
    return groups


@triton.jit
def _kth(keys, K: tl.constexpr, KPAD: tl.constexpr):
    return tl.min(tl.where(tl.arange(0, KPAD) < K, keys, 0x7FFFFFFF), axis=0)


@triton.jit(do_not_specialize=["tokens", "start", "ignore_index"])
def token_statistics_kernel(
    rows,
    row_stride,
    target,
    values,
    sums,
    tokens,
    width,
    start,
    ignore_index,
    K: tl.constexpr,
    KPAD: tl.constexpr,
    BUCKETS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TARGET: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """``width`` columns are of the true vocabulary."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KPAD)
    out = values + token * (K + TARGET)
    y = start
    if TARGET:
        y = tl.load(target + token)
    if TARGET and y == ignore_index:
        tl.store(out + place, tl.zeros([KPAD], tl.float32).to(values.dtype.element_ty), mask=place < K)
        tl.store(out + K, tl.zeros([], tl.float32).to(values.dtype.element_ty))
        tl.store(sums + token, 1.0)
        if SQUARES:
            tl.store(sums + tokens + token, 1.0)
        return

    TILE: tl.constexpr = BUCKETS * GROUP
    TRACK: tl.constexpr = K > 1
    row = rows + token * row_stride
    bucket = tl.arange(0, BUCKETS)
    lane = tl.arange(0, GROUP)
    columns = bucket[:, None] * GROUP + lane[None, :]
    aligned, lead = align_down(row, GROUP)
    end = lead + width
    readable = (end + GROUP - 1) // GROUP * GROUP
    total = tl.zeros([BUCKETS], tl.float32)
    squares = tl.zeros([BUCKETS], tl.float32)
    p1 = tl.full([BUCKETS], MINUS_INF, tl.float32)
    p2 = tl.full([BUCKETS], MINUS_INF, tl.float32)
    p3 = tl.full([BUCKETS], MINUS_INF, tl.float32)
    s1 = tl.zeros([BUCKETS], tl.int32)
    s2 = tl.zeros([BUCKETS], tl.int32)
    s3 = tl.zeros([BUCKETS], tl.int32)

    # The next tile is on its way while this one is worked on.
    last = tl.maximum(end - 1, 0) // TILE * TILE
    x = tl.load(aligned + columns, mask=columns < readable, other=MINUS_INF)
    x = tl.where(columns >= lead, x, MINUS_INF)
    for begin in range(TILE, last, TILE):
        following = tl.load(aligned + begin + columns)
        total, squares, p1, p2, p3, s1, s2, s3 = _consume(
            x, begin // TILE - 1, total, squares, p1, p2, p3, s1, s2, s3, TRACK, SQUARES
        )
        x = following
    if last > 0:
        following = tl.load(aligned + last + columns, mask=columns < readable - last, other=MINUS_INF)
        total, squares, p1, p2, p3, s1, s2, s3 = _consume(
            x, last // TILE - 1, total, squares, p1, p2, p3, s1, s2, s3, TRACK, SQUARES
        )
        x = following
    x = tl.where(columns < end - last, x, MINUS_INF)
    total, squares, p1, p2, p3, s1, s2, s3 = _consume(
        x, last // TILE, total, squares, p1, p2, p3, s1, s2, s3, TRACK, SQUARES
    )

    maximum = tl.max(p1, axis=0)
    rescale = tl.exp2((tl.maximum(p1, LOWEST) - tl.maximum(maximum, LOWEST)) * LOG2E)
    row_total = tl.sum(total * rescale, axis=0)
    if TARGET:
        tl.store(sums + token, row_total)
    if SQUARES:
        tl.store(sums + tokens + token, tl.sum(squares * (rescale * rescale), axis=0))

    if TRACK:
        g1 = s1 * BUCKETS + bucket
        g2 = s2 * BUCKETS + bucket
        g3 = s3 * BUCKETS + bucket
        left = to_key(p3)
        groups = _largest_groups(to_key(p1), to_key(p2), left, g1, g2, g3, bucket, K, KPAD)
        nothing = tl.full([KPAD], KEY_OF_MINUS_INF, tl.int32)
        keys = largest_keys(
            nothing, _load_groups(aligned, groups, groups >= 0, lane, lead, end, readable, GROUP), K, KPAD
        )
        kth = _kth(keys, K, KPAD)
        while tl.max(left, axis=0) > kth:
            b = tl.min(tl.where(left > kth, bucket, BUCKETS), axis=0)
            seen1 = tl.max(tl.where(bucket == b, g1, -1), axis=0)
            seen2 = tl.max(tl.where(bucket == b, g2, -1), axis=0)
            seen3 = tl.max(tl.where(bucket == b, g3, -1), axis=0)
            left = tl.where(bucket == b, KEY_OF_MINUS_INF, left)
            for begin in range(0, last + TILE, TILE * CHUNK):
                group = (begin // TILE + tl.arange(0, CHUNK)) * BUCKETS + b
                unseen = (group != seen1) & (group != seen2) & (group != seen3)
                more = _load_groups(aligned, group, unseen, lane, lead, end, readable, GROUP)
                if tl.max(tl.max(more, axis=1), axis=0) > kth:
                    keys = largest_keys(keys, more, K, KPAD)
                    kth = _kth(keys, K, KPAD)
        largest = from_key(keys)
    else:
        largest = tl.full([KPAD], 0.0, tl.float32) + maximum
    # A NaN or +inf anywhere in the row has made the sum NaN; it must not end up between finite values.
    largest = tl.where(row_total != row_total, row_total, largest)
    tl.store(out + place, largest.to(values.dtype.element_ty), mask=place < K)
    if TARGET:
        index = y - start
        owned = (index >= 0) & (index < width)
        logit = tl.load(row + index, mask=owned, other=MINUS_INF)
        tl.store(out + K, logit.to(values.dtype.element_ty))


def launch_statistics(
    rows: torch.Tensor,
    target: torch.Tensor | None,
    values: torch.Tensor,
    sums: torch.Tensor | None,
    *,
    start: int,
    width: int,
    k: int,
    ignore_index: int,
    shape: StreamShape,
) -> None:
    """Fill one rank's message with the statistics of every row, see :class:`eaft_megatron.loss.exchange.Message`.

    Args:
        rows: ``[N, V_local]`` bf16, fp16 or fp32, columns contiguous, rows at any stride.
        target: ``[N]`` int64 global ids; rows at ``ignore_index`` are not read. None: every row, and no target logit.
        values: ``[N, k + 1]`` (``[N, k]`` without target) in the dtype of ``rows``; written.
        sums: ``[1 or 2, N]`` float32; written. With two rows the second gets the sum of squared exponentials. None
            without target.
        start: global id of the first column.
        width: columns of the true vocabulary.
        k: 1 to 128.
        ignore_index: see ``target``.
        shape: from :mod:`eaft_megatron.loss.kernels.tuning`.
    """
    tokens = rows.shape[0]
    if tokens == 0:
        return
    token_statistics_kernel[(tokens,)](
        rows,
        rows.stride(0),
        target,
        values,
        sums,
        tokens,
        width,
        start,
        ignore_index,
        K=k,
        KPAD=max(triton.next_power_of_2(k), 2),
        BUCKETS=shape.buckets,
        GROUP=shape.group,
        CHUNK=shape.chunk,
        TARGET=target is not None,
        SQUARES=sums is not None and sums.shape[0] > 1,
        num_warps=1,
        enable_fp_fusion=True,
    )
