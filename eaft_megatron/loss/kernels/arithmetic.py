"""Small device functions that the kernels share. Every number here is float32, every key int32."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # few enough bits that its product with a small integer is exact
LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
MINUS_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32 numbers
KEY_OF_MINUS_INF = tl.constexpr(-2139095041)


@triton.jit
def to_key(x):
    """Integers in the order of the numbers: exact to compare, and the hardware reduces them across a warp at once."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    """The number that :func:`to_key` was given."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def align_down(row, GROUP: tl.constexpr):
    """The last 16-byte boundary at or before ``row``, and how many of its elements lie between; GROUP fill 16 bytes."""
    lead = (row.to(tl.int64) % 16 // (16 // GROUP)).to(tl.int32)
    return tl.multiple_of(row - lead, 16), lead


@triton.jit
def exp_of_negative(x):
    """exp(x) for x <= 0 to two last places, where exp2(x log2 e) loses |x| last places; 0 below -87, NaN stays NaN."""
    inside = tl.where(x < -87.0, 0.0, x)
    n = tl.floor(inside * LOG2E + 0.5)
    rest = (inside - n * LN2_HIGH) - n * LN2_LOW
    return tl.where(x < -87.0, 0.0, tl.exp2(n) * tl.exp2(rest * LOG2E))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 without losing a small x (the classic correction by the rounding error of 1 + x)."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def largest_keys(a, b, K: tl.constexpr, KPAD: tl.constexpr):
    """The K largest of two sets of keys, as a multiset in descending order: ``a`` [KPAD], ``b`` [m, n] -> [KPAD].

    Each round takes every copy of the largest key left, so that ties need no positions. Taken keys become that of
    -inf; with fewer than K keys above it the rest of the result is -inf.
    """
    place = tl.arange(0, KPAD)
    result = tl.full([KPAD], KEY_OF_MINUS_INF, tl.int32)
    filled = 0
    while filled < K:
        best = tl.maximum(tl.max(a, axis=0), tl.max(tl.max(b, axis=1), axis=0))
        copies = tl.sum((a == best).to(tl.int32), axis=0) + tl.sum(tl.sum((b == best).to(tl.int32), axis=1), axis=0)
        result = tl.where((place >= filled) & (place < filled + copies), best, result)
        a = tl.where(a == best, KEY_OF_MINUS_INF, a)
        b = tl.where(b == best, KEY_OF_MINUS_INF, b)
        filled += copies
    return result
