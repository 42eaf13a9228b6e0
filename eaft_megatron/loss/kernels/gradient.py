"""The backward pass, slope * (softmax - onehot): one read of the logits and one write, in place if asked."""

import torch
import triton
import triton.language as tl

from eaft_megatron.loss.kernels.arithmetic import LOG2E, MINUS_INF
from eaft_megatron.loss.kernels.tuning import gradient_block


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
):
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target + token)
    s = tl.zeros([], tl.float32)
    if y != ignore_index:  # an upstream NaN at an ignored token must not be multiplied by 0
        s = tl.load(slope + token) * tl.load(upstream + token).to(tl.float32)
    here = out + token * out_stride + column
    if s == 0.0:
        tl.store(here, tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty), mask=column < columns)
        return
    x = tl.load(rows + token * row_stride + column, mask=column < columns, other=MINUS_INF).to(tl.float32)
    g = tl.exp2((x - tl.load(maximum + token)) * LOG2E) * (s / tl.load(sum_exp + token))
    g = tl.where(column == (y - start).to(tl.int32), g - s, g)
    tl.store(here, tl.where(column < width, g, 0.0).to(out.dtype.element_ty), mask=column < columns)


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
    blocks = triton.cdiv(columns, block)
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
        num_warps=warps,
        enable_fp_fusion=True,
    )
