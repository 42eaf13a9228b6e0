"""Inputs that every implementation of the loss must survive, and the comparison with the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.loss.reference import reference_eaft_loss

INF = float("inf")


@dataclasses.dataclass
class Case:
    """Full-vocabulary logits (padding included, divisible by 4), targets, and the arguments of the loss."""

    name: str
    logits: Tensor
    target: Tensor
    kwargs: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.kwargs.get("vocab_size") or self.logits.shape[-1]

    def shard(self, rank: int, size: int) -> Tensor:
        """Rank's columns, as a tensor of its own with the case's memory layout."""
        width = self.logits.shape[-1] // size
        return self.logits[..., rank * width : (rank + 1) * width].clone(memory_format=torch.preserve_format)

    def upstream(self) -> Tensor:
        """Unequal upstream gradients, one per token."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(self.target.shape, generator=generator, dtype=torch.float64)


def _random(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _targets(seed: int, shape: tuple[int, ...], vocab: int, ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, vocab, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def build_cases(dtype: torch.dtype) -> list[Case]:
    """Every case in one dtype; names say what is hard about each."""
    cases = []

    def add(name: str, logits: Tensor, target: Tensor, **kwargs: Any) -> None:
        cases.append(Case(name, logits.to(dtype), target, kwargs))

    add("plain", _random(0, 3, 5, 256), _targets(0, (3, 5), 256))
    add("vocabulary of 257, padded on the last rank", _random(1, 4, 3, 260), _targets(1, (4, 3), 257), vocab_size=257)
    padded = _random(2, 6, 160)
    padded[:, 70:] = float("nan")  # what padding holds must not matter
    add("ranks with nothing but padding", padded, _targets(2, (6,), 70, 0), vocab_size=70)
    add("ties at place K", (_random(3, 8, 256, scale=1.0) * 2).round() / 2, _targets(3, (8,), 256))
    holes = _random(4, 9, 128).masked_fill(torch.rand(9, 128, generator=torch.Generator().manual_seed(4)) < 0.9, -INF)
    holes[0, :64] = -INF  # at tp 2 and 4 whole shards of nothing
    add("-inf columns, some targets on them", holes, _targets(4, (9,), 128))
    onehot = torch.full((4, 64), -INF, dtype=torch.float64)
    onehot[:, 17] = torch.tensor([0.0, 3.0, -7.0, 30.0], dtype=torch.float64)
    onehot[2:, 40] = -30.0
    add("one-hot rows", onehot, torch.tensor([17, 3, 17, 40]))
    add("vocabulary smaller than K", _random(5, 5, 8), _targets(5, (5,), 7), vocab_size=7)
    add("K = 1 with a norm", _random(6, 5, 64), _targets(6, (5,), 64), topk=1, entropy_norm=2.0)
    for alpha in (0.0, 0.5, 2.0):
        add(f"alpha {alpha}", torch.cat([_random(7, 4, 64), onehot]), _targets(7, (8,), 64), alpha=alpha)
    add("entropy_norm 3.0", _random(8, 7, 200), _targets(8, (7,), 200), entropy_norm=3.0)
    add("all tokens ignored", torch.full((4, 64), float("nan")), torch.full((4,), -100))
    add("no tokens at all", torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64))
    add("[s, b, V] view of [b, s, V] storage", _random(9, 3, 4, 128).transpose(0, 1), _targets(9, (4, 3), 128))
    add(
        "columns enough for the two-level top-K",
        _random(10, 7, 9000),
        _targets(10, (7,), 8991),
        topk=3,
        vocab_size=8991,
    )
    broken = _random(11, 6, 128)
    broken[0, 3], broken[1, 100], broken[2, 64], broken[3, 5] = float("nan"), INF, float("nan"), INF
    add("NaN and +inf", broken, torch.tensor([1, 2, -100, -100, 7, 90]))
    add("other ignore_index", _random(12, 6, 64), torch.tensor([0, 1, 2, 0, 63, 5]), ignore_index=0)
    return cases


@dataclasses.dataclass
class Outcome:
    """What one implementation made of a case; the gradient over the full vocabulary, padding included."""

    loss: Tensor
    ce: Tensor
    entropy: Tensor
    weight: Tensor
    gradient: Tensor


def reference_outcome(case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """The oracle's answer, computed in ``dtype``; in a low dtype this is the naive computation."""
    logits = case.logits.detach().to(dtype).requires_grad_()
    loss, ce, entropy, weight = reference_eaft_loss(logits, case.target, **case.kwargs)
    loss.backward(case.upstream().to(dtype))
    return Outcome(loss.detach(), ce.detach(), entropy, weight, logits.grad)


def assert_matches(actual: Outcome, case: Case, where: str) -> None:
    """Every number within 1e-12 (float64), else within twice the naive float32 computation's own error."""
    expected = reference_outcome(case)
    naive = reference_outcome(case, torch.float64 if case.logits.dtype == torch.float64 else torch.float32)
    naive.gradient = naive.gradient.to(case.logits.dtype)  # what any implementation must round to in the end
    for field in dataclasses.fields(Outcome):
        a, e, n = (getattr(outcome, field.name).double() for outcome in (actual, expected, naive))
        assert a.shape == e.shape, f"{where}: {case.name}: {field.name} has shape {tuple(a.shape)}"
        odd = (
            ~e.isfinite() | ~n.isfinite()
        )  # inf stays inf, NaN stays NaN; a float16 may overflow where float64 did not
        assert torch.equal(a[odd].isfinite(), n[odd].isfinite()), f"{where}: {case.name}: {field.name}"
        assert torch.equal(a[odd].isnan(), n[odd].isnan()), f"{where}: {case.name}: {field.name}"
        floor = 1e-12 if case.logits.dtype == torch.float64 else 3e-7  # a few last places of numbers of order one
        bound = 2 * (n - e)[~odd].abs().amax() if (~odd).any() else 0.0
        error = (a - e)[~odd].abs()
        limit = floor * (1 + e[~odd].abs()) + bound
        assert (error <= limit).all(), (
            f"{where}: {case.name}: {field.name} off by {error.max():.3g} (naive {bound / 2:.3g})"
        )
