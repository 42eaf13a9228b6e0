"""Launch shapes. Chosen from compiled resource numbers: never timed on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class StreamShape(NamedTuple):
    """How one warp walks over a row.

    Attributes:
        buckets: independent running statistics, a multiple of 32: each lane holds buckets / 32 of them.
        group: contiguous columns per bucket and step, one 16-byte load.
        chunk: groups looked at together when a bucket has to be read again.
    """

    buckets: int
    group: int
    chunk: int


def stream_shape(k: int, dtype: torch.dtype) -> StreamShape:
    """For the ``k`` largest: a fixed choice, so that no training step ever waits for a search.

    With 128 buckets a warp needs about 100 registers, so that 20 of them share a multiprocessor with 4 kB each on its
    way; with 256, 180 registers and 11 warps with 8 kB. The number of instructions per element is the same, and the
    work at the end of a row smaller with fewer buckets. But a bucket that holds three of the k largest groups has to
    be read again: at k = 20 that is one in 15 rows with 128 buckets, at k = 128 it would be 20 buckets in every row.
    """
    return StreamShape(128 if k <= 32 else 256, 16 // dtype.itemsize, 32)


def gradient_block(dtype: torch.dtype) -> tuple[int, int]:
    """``(columns per program, warps)`` of the gradient kernel: four 16-byte loads a thread."""
    return 64 // dtype.itemsize * 128, 4
