"""The backward pass, slope * (softmax - onehot): one read of the logits and one write, in place if asked.

Names: ``y`` the target's column, ``s`` the slope times the upstream gradient, ``x`` logits, ``g`` their gradient.
Rows of any alignment are read and written 16 bytes at a time, but for the first and last block of a row: a store,
unlike a load, must not touch what lies beside the row.
"""

import torch
import triton
import triton.language as tl

from eaft_megatron.loss.kernels.arithmetic import LOG2E, MINUS_INF, align_down
from eaft_megatron.loss.kernels.tuning import gradient_block


@triton.jit
def _gradient(x, column, y, maximum, sum_exp, slope, width):
    """Of one block of a row; ``column`` counts from the row's first, ``y`` is the target's. 0 in the padding."""
    g = tl.exp2((x.to(tl.float32) - maximum) * LOG2E) * (slope / sum_exp)
    g = tl.where(column == y, g - slope, g)
    return tl.where(column < width, g, 0.0)


@triton.jit(do_not_specialize=["blocks", "start", "ignore_index"])
def gradient_kernel(
    rows,
    row_stride,
    out,
    out_stride,
    target,
    maximum,
    sum_exp,
    slope,
    upstream,
    columns,
    width,
    blocks,
    start,
    ignore_index,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program per block of a row. ``ALIGNED``: see the launcher; else rows of both lie alike to 16 bytes."""
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    block = program % blocks * BLOCK
    y = tl.load(target + token)
    s = tl.zeros([], tl.float32)
    if y != ignore_index:  # an upstream NaN at an ignored token must not be multiplied by 0
        s = tl.load(slope + token) * tl.load(upstream + token).to(tl.float32)
    y = (y - start).to(tl.int32)
    source = rows + token * row_stride
    written = out + token * out_stride
    lead = 0
    if not ALIGNED:
        # Blocks are counted from the 16-byte boundary before the row, so that all but the first and last are whole.
        source, lead = align_down(source, GROUP)
        written, _ = align_down(written, GROUP)
    column = block + tl.arange(0, BLOCK)
    inside = column < columns
    if not ALIGNED:
        if (block >= lead) & (block + BLOCK <= lead + columns):
            g = tl.zeros([BLOCK], tl.float32)
            if s != 0.0:
                x = tl.load(source + column)
                g = _gradient(x, column - lead, y, tl.load(maximum + token), tl.load(sum_exp + token), s, width)
            tl.store(written + column, g.to(out.dtype.element_ty))
            return
        inside = (column >= lead) & (column < lead + columns)
    if s == 0.0:
        tl.store(written + column, tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty), mask=inside)
        return
    x = tl.load(source + column, mask=inside, other=MINUS_INF)
    g = _gradient(x, column - lead, y, tl.load(maximum + token), tl.load(sum_exp + token), s, width)
    tl.store(written + column, g.to(out.dtype.element_ty), mask=inside)


def launch_gradient(
    rows: torch.Tensor,
    target: torch.Tensor,
    maximum: torch.Tensor,
    sum_exp: torch.Tensor,
    slope: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
    *,
    start: int,
    width: int,
    ignore_index: int,
) -> None:
    """Write the gradient of ``sum(upstream * loss)`` where d loss / d ce = slope.

    Args:
        rows: ``[N, V_local]`` logits, columns contiguous.
        target: ``[N]`` int64 global ids.
        maximum: ``[N]`` float32, the global maximum of each row.
        sum_exp: ``[N]`` float32, the global sum of exponentials relative to it.
        slope: ``[N]`` float32.
        upstream: ``[N]``. Where its product with slope is 0, and at ignored tokens, the row's gradient is exactly 0
            and its logits are not read.
        out: ``[N, V_local]`` in the logits' dtype, columns contiguous; may be ``rows``. Padding columns get 0.
        start: global id of the first column.
        width: columns of the true vocabulary.
        ignore_index: target value of tokens that do not count.
    """
    tokens, columns = rows.shape
    if tokens == 0:
        return
    block, warps = gradient_block(rows.dtype)
    block = min(block, max(triton.next_power_of_2(columns), 16))
    group = 16 // rows.dtype.itemsize
    # Multiples of 16 are what Triton specialises on: then it knows that no 16-byte step crosses the end of a row.
    aligned = rows.data_ptr() % 16 == out.data_ptr() % 16 == 0
    aligned = aligned and rows.stride(0) % 16 == out.stride(0) % 16 == columns % 16 == 0
    if _offset(rows) != _offset(out):  # a view of something wider, not in place: nobody's training step
        rows = torch.empty_like(out).copy_(rows)
    blocks = triton.cdiv(columns + (0 if aligned else group - 1), block)
    gradient_kernel[(tokens * blocks,)](
        rows,
        rows.stride(0),
        out,
        out.stride(0),
        target,
        maximum,
        sum_exp,
        slope,
        upstream,
        columns,
        width,
        blocks,
        start,
        ignore_index,
        BLOCK=block,
        GROUP=group,
        ALIGNED=aligned,
        num_warps=warps,
        enable_fp_fusion=True,
    )


def _offset(rows: torch.Tensor) -> tuple[int, int]:
    """Bytes from a 16-byte boundary to the first row, and by which each row shifts against the one before."""
    return rows.data_ptr() % 16, rows.stride(0) * rows.itemsize % 16 if rows.shape[0] > 1 else 0
