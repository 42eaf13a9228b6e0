"""Gates that follow the target's probability p alone, or with the shape of the whole prediction.

Their sources state objectives in p and differentiate them. Here the loss is ``weight * ce`` with the weight detached,
whose gradient is the same; the value is not, and the docstrings give the source's.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from eaft_megatron.loss.gate import Gate, GateContext, check_number
from eaft_megatron.loss.token_stats import TokenStats


@dataclasses.dataclass(frozen=True)
class PowerGate(Gate):
    """``w = p ** exponent`` (arXiv 2510.00526; its code: objective ``(1 - p ** q) / q``, same gradient).

    The authors' examples use 8 and 10; there is no default. 1 is DFT, 0 plain SFT. A negative exponent, which favours
    improbable tokens, cannot be run in the authors' code; that it may here, and its clamp, are our choice.

    Attributes:
        exponent: q, finite.
        max_weight: upper limit of the weight, > 0; acts only where the exponent is negative.
    """

    exponent: float = 1.0
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        check_number(True, "exponent (--power-exponent) must be finite", self.exponent)
        check_number(self.max_weight > 0, "max_weight (--power-max-weight) must be finite and > 0", self.max_weight)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        if self.exponent == 0:  # also where p = 0
            return torch.ones_like(stats.ce)
        weight = (-self.exponent * stats.ce).exp()
        return weight if self.exponent > 0 else weight.clamp(max=self.max_weight)


@dataclasses.dataclass(frozen=True)
class ProFitGate(Gate):
    """``w = 1[p >= threshold]`` (ProFit, arXiv 2601.09195; its code's "higher", threshold 0.1).

    The mean stays over all valid tokens, as in the authors' code under the Hugging Face Trainer's token count; without
    that count their code divides by the kept tokens alone.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_number(0 <= self.threshold <= 1, "threshold (--profit-threshold) must lie in [0, 1]", self.threshold)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return (stats.probability >= self.threshold).to(stats.ce.dtype)


@dataclasses.dataclass(frozen=True)
class TrSFTGate(Gate):
    """Trust-region SFT: ``w = min(1, p / threshold)`` (TRAPO, arXiv 2512.17636; its code: "clip_low", fixed at 0.1).

    Objective of the authors' code: ``-p / max(sg(p), threshold)`` with the advantage 1, same gradient. There it is one
    term of a reinforcement-learning loss; the mean over the tokens of SFT data is our reading.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_number(0 < self.threshold <= 1, "threshold (--trsft-threshold) must lie in (0, 1]", self.threshold)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return (stats.probability / self.threshold).clamp(max=1)


@dataclasses.dataclass(frozen=True)
class DEFTGate(Gate):
    """``w = p ** a``, ``a = sum_v p_v ** 2`` over the true vocabulary (DEFT, arXiv 2602.11424).

    Objective of the authors' code: ``(1 - p ** a) / (a + 1e-6)`` with a detached. Its gradient is ours times
    ``a / (a + 1e-6)``, which is 1 but for nearly uniform predictions; the 1e-6 is left out here.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"sum_p_squared"})

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        assert stats.sum_p_squared is not None
        return (-stats.sum_p_squared * stats.ce).exp()
