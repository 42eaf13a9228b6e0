"""Random shapes, strides, dtypes and infinities: kernels against plain torch; few cases where interpreted."""

from __future__ import annotations

import warnings

import pytest
import torch

from eaft_megatron import vocab_parallel_eaft_loss
from tests.loss.kernel_cases import DEVICE, where_kernels_run

pytest.importorskip("triton", "3.9" if DEVICE == "cpu" else "3.4", reason="the kernels run too (pip install triton)")

CASES = 300 if DEVICE == "cuda" else 6


def _case(seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits (a view of any stride and offset), targets and options."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    dtype = (torch.float32, torch.bfloat16, torch.float16)[draw(0, 2)]
    tokens, columns = draw(1, 4), draw(2, 30000 if DEVICE == "cuda" else 300)
    stride, base = columns + draw(0, 9), draw(0, 7)
    storage = (torch.randn(base + tokens * stride, generator=generator) * (1, 3, 30)[draw(0, 2)]).to(dtype)
    logits = storage[base:].view(tokens, stride)[:, :columns]
    holes = torch.rand(tokens, columns, generator=generator) < (0.0, 0.5)[draw(0, 1)]
    holes[:, 0] = False
    logits[holes] = -torch.inf
    vocab = draw(2, columns)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < 0.3] = -100
    options = {"topk": draw(2, 128 if DEVICE == "cuda" else 6), "vocab_size": vocab}
    return logits.to(DEVICE), target.to(DEVICE), options


def _both(seeds: range) -> dict:
    warnings.simplefilter("ignore")
    out = {}
    for seed in seeds:
        logits, target, options = _case(seed)
        for impl in ("torch", "triton"):
            leaf = logits.detach().requires_grad_()
            loss, stats = vocab_parallel_eaft_loss(leaf, target, impl=impl, return_stats=True, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            out[seed, impl] = [tensor.detach().cpu() for tensor in (loss, stats.weight, gradient)]
    return out


@pytest.mark.slow
def test_the_kernels_agree_with_plain_torch_on_anything():
    """Loss and weight to 2e-5, the gradient to a place of its dtype."""
    answers = where_kernels_run(_both, range(CASES))
    for seed in range(CASES):
        plain, kernel = answers[seed, "torch"], answers[seed, "triton"]
        for actual, expected in zip(kernel[:2], plain[:2], strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5, msg=lambda m, n=seed: f"seed {n}: {m}")
        place = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[plain[2].dtype]
        torch.testing.assert_close(kernel[2], plain[2], rtol=place, atol=1e-5, msg=lambda m, n=seed: f"seed {n}: {m}")
