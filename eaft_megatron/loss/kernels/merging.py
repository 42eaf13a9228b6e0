"""From the gathered statistics of all ranks to each token's numbers: one program per token, the same on every rank.

A program holds ``[RPAD, KPAD]`` largest logits ``x`` of its token, rank by rank, padded to powers of two with -inf, and
``[RPAD]`` of what each rank sent once: ``local`` its maximum, ``local_sum`` and ``local_squares`` relative to that.
Sums over ranks are reductions within one warp, in an order that the compiler fixes once: the same on every rank.
"""

import torch
import triton
import triton.language as tl

from eaft_megatron.loss.kernels.arithmetic import (
    KEY_OF_MINUS_INF,
    MINUS_INF,
    exp_of_negative,
    from_key,
    log1p,
    to_key,
)


@triton.jit
def _topk_entropy(keys, maximum, K: tl.constexpr):
    """Entropy of softmax over the K largest keys, by the formula of eaft_megatron.loss.exchange.topk_entropy.

    The terms are added one value after another in descending order, equal ones at once: the result depends on the
    multiset alone, so it has the same bits at every tensor-parallel size.
    """
    rest = 0.0
    moment = 0.0
    filled = 0
    while filled < K:
        best = tl.max(tl.max(keys, axis=1), axis=0)
        copies = tl.sum(tl.sum((keys == best).to(tl.int32), axis=1), axis=0)
        keys = tl.where(keys == best, KEY_OF_MINUS_INF, keys)
        distance = from_key(best) - maximum
        e = exp_of_negative(distance)
        counted = tl.minimum(copies, K - filled)
        counted = tl.where(filled == 0, counted - 1, counted)  # the maximum itself is the 1 in 1 + rest
        rest += counted * e
        moment += tl.where(e > 0.0, counted * (-distance * e), 0.0)
        filled += copies
    return log1p(rest) + moment / (1.0 + rest)


@triton.jit(do_not_specialize=["tokens", "values_stride", "sums_stride", "vocab_size", "ignore_index"])
def merge_kernel(
    values,
    values_stride,
    sums,
    sums_stride,
    target,
    maximum_out,
    sum_exp_out,
    ce_out,
    entropy_out,
    squares_out,
    tokens,
    vocab_size,
    ignore_index,
    RANKS: tl.constexpr,
    RPAD: tl.constexpr,
    KL: tl.constexpr,
    KPAD: tl.constexpr,
    K: tl.constexpr,
    TARGET: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    y = tl.zeros([], tl.int64)
    if TARGET:
        y = tl.load(target + token)
    if TARGET and y == ignore_index:
        tl.store(maximum_out + token, 0.0)
        tl.store(sum_exp_out + token, 1.0)
        tl.store(ce_out + token, 0.0)
        if ENTROPY:
            tl.store(entropy_out + token, 0.0)
        if SQUARES:
            tl.store(squares_out + token, 0.0)
        return

    rank = tl.arange(0, RPAD)
    place = tl.arange(0, KPAD)
    rank_values = values + rank.to(tl.int64) * values_stride + token * (KL + TARGET)
    inside = (rank < RANKS)[:, None] & (place < KL)[None, :]
    x = tl.load(rank_values[:, None] + place[None, :], mask=inside, other=MINUS_INF).to(tl.float32)
    local = tl.load(rank_values, mask=rank < RANKS, other=MINUS_INF).to(tl.float32)  # each rank's maximum comes first
    broken = tl.sum((local != local).to(tl.int32), axis=0) > 0
    maximum = tl.where(broken, float("nan"), tl.max(local, axis=0))
    if ENTROPY:
        entropy = _topk_entropy(to_key(x), maximum, K)
        tl.store(entropy_out + token, entropy + (maximum - maximum))  # adds 0, or NaN to a row of nothing but -inf
    if TARGET:
        rescale = tl.where(local == MINUS_INF, 0.0, exp_of_negative(local - maximum))
        local_sum = tl.load(sums + rank * sums_stride + token, mask=rank < RANKS, other=0.0)
        sum_exp = tl.sum(local_sum * rescale, axis=0)
        logit = tl.load(rank_values + KL, mask=rank < RANKS, other=MINUS_INF).to(tl.float32)
        ce = (maximum - tl.max(logit, axis=0)) + tl.log(sum_exp)
        tl.store(maximum_out + token, maximum)
        tl.store(sum_exp_out + token, sum_exp)
        tl.store(ce_out + token, tl.where((y < 0) | (y >= vocab_size), float("nan"), ce))
        if SQUARES:
            local_squares = tl.load(sums + rank * sums_stride + tokens + token, mask=rank < RANKS, other=0.0)
            tl.store(squares_out + token, tl.sum(local_squares * (rescale * rescale), axis=0) / (sum_exp * sum_exp))


def launch_merge(
    values: torch.Tensor,
    sums: torch.Tensor | None,
    target: torch.Tensor | None,
    *,
    maximum: torch.Tensor | None = None,
    sum_exp: torch.Tensor | None = None,
    ce: torch.Tensor | None = None,
    entropy: torch.Tensor | None,
    sum_p_squared: torch.Tensor | None = None,
    k_local: int,
    k: int,
    vocab_size: int = 0,
    ignore_index: int = 0,
) -> None:
    """Merge the gathered messages of all ranks, in rank order.

    Args:
        values: ``[tp, N, k_local + 1]`` (``k_local`` without target), rows contiguous; each rank's descending.
        sums: ``[tp, 1 or 2, N]`` float32, relative to each rank's own maximum; None without target.
        target: ``[N]`` int64 global ids, or None for the entropy alone.
        maximum, sum_exp, ce: ``[N]`` float32, written; None without target. A target outside the vocabulary gives a
            NaN ce. Ignored tokens get 0, and 1 as sum_exp.
        entropy, sum_p_squared: the same, or None where they are not wanted.
        k_local: largest logits per rank.
        k: K of the entropy over the whole vocabulary.
        vocab_size: the true one.
        ignore_index: target value of tokens that do not count.
    """
    ranks, tokens = values.shape[:2]
    if tokens == 0:
        return
    merge_kernel[(tokens,)](
        values,
        values.stride(0),
        sums,
        0 if sums is None else sums.stride(0),
        target,
        maximum,
        sum_exp,
        ce,
        entropy,
        sum_p_squared,
        tokens,
        vocab_size,
        ignore_index,
        RANKS=ranks,
        RPAD=max(triton.next_power_of_2(ranks), 2),
        KL=k_local,
        KPAD=max(triton.next_power_of_2(k_local), 2),
        K=k,
        TARGET=target is not None,
        ENTROPY=entropy is not None,
        SQUARES=sum_p_squared is not None,
        num_warps=1,
        enable_fp_fusion=True,
    )
