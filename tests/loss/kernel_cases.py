"""What the kernels are tried on, and where: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.loss.plan import Plan, Shard
from eaft_megatron.testing import run_distributed

INF = float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def where_kernels_run(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` here on a machine with a GPU, else in a process of its own under TRITON_INTERPRET=1.

    Triton reads the variable when it is imported, so it cannot be set in the process that runs the tests.
    """
    if DEVICE == "cuda":
        return fn(*args)
    (result,) = run_distributed(fn, 1, *args, env={"TRITON_INTERPRET": "1"}, timeout=500)
    return result


def adversarial_rows(width: int, buckets: int, group: int) -> dict[str, Tensor]:
    """Rows ``[width]`` that a bounded number of kept groups would get wrong; -inf, ties and extremes among them."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(width, dtype=torch.float64)
    noise = torch.randn(width, generator=generator, dtype=torch.float64)
    bucket = (ramp.long() // group) % buckets
    nearly_nothing = torch.full((width,), -INF, dtype=torch.float64)
    nearly_nothing[width // 2] = -3.0
    holes = noise.clone().masked_fill(torch.rand(width, generator=generator) < 0.97, -INF)
    return {
        "ascending": ramp / 8,
        "descending": -ramp / 8,
        "all equal": torch.full((width,), -1.5, dtype=torch.float64),
        "two values": (noise > 0.3).double(),
        "ties everywhere": (2 * noise).round(),
        "normal": 4 * noise,
        "the largest all in one bucket": noise + 50.0 * (bucket == 1),
        "the largest in two buckets, tied": (noise / 4).round() + 9.0 * ((bucket == 0) | (bucket == buckets - 1)),
        "a staircase over the steps of one bucket": torch.where(bucket == 2, ramp / 16, noise),
        "hardly any finite": holes,
        "one finite": nearly_nothing,
        "none finite": torch.full((width,), -INF, dtype=torch.float64),
        "large numbers": 1000 * noise,
        "the last column": torch.where(ramp == width - 1, 30.0, noise),
    }


def shard_rows(full: Tensor, rank: int, size: int, vocab_size: int, k: int) -> tuple[Tensor, Plan]:
    """One of ``size`` ranks' columns of ``full`` [N, V], and the plan of all statistics there, without a group."""
    columns = full.shape[1] // size
    plan = Plan(
        group=None,
        shard=Shard.of(rank, columns, vocab_size),
        vocab_size=vocab_size,
        k=k,
        k_local=min(k, columns),
        topk=k,
        exchange="packed",
        triton=True,
        ignore_index=-100,
        entropy=True,
        sum_squares=True,
    )
    return full[:, rank * columns : (rank + 1) * columns].contiguous(), plan
