"""Gates: what each method makes of a token's statistics.

A gate turns :class:`TokenStats` into two detached numbers per token: the loss, and its slope with respect to the
cross entropy. The backward pass is then ``slope * (softmax - onehot)`` for every method. A reweighting method has
``loss = weight * ce`` and ``slope = weight``; it subclasses :class:`Gate` and writes one method, ``weight``.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eaft_megatron.loss.token_stats import TokenStats


class GateOutput(NamedTuple):
    """Per token, flat: the loss, d loss / d ce, and the weight to report. All detached."""

    loss: Tensor
    slope: Tensor
    weight: Tensor


class Gate(abc.ABC):
    """Base of all gates. Instances are frozen dataclasses holding plain numbers.

    Attributes:
        needs: which optional fields of :class:`TokenStats` must be filled: ``"entropy"``, ``"sum_p_squared"``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, topk: int) -> None:  # noqa: B027  not abstract: most gates have nothing to check
        """Raise ``ValueError`` if the gate cannot work with this K = min(topk, V); the default accepts any."""

    @abc.abstractmethod
    def weight(self, stats: TokenStats) -> Tensor:
        """``[N]`` weight of each token. Values at ignored tokens do not matter."""

    def __call__(self, stats: TokenStats) -> GateOutput:
        """Weight the cross entropy. A target with p = 0 has an infinite loss, also where its weight is 0."""
        weight = torch.where(stats.valid, self.weight(stats), 0)
        loss = torch.where(torch.isposinf(stats.ce), stats.ce, weight * stats.ce)
        return GateOutput(loss, weight, weight)


@dataclasses.dataclass(frozen=True)
class SFTGate(Gate):
    """Plain supervised fine-tuning: every token has weight 1."""

    def weight(self, stats: TokenStats) -> Tensor:
        return torch.ones_like(stats.ce)


@dataclasses.dataclass(frozen=True)
class EAFTGate(Gate):
    """EAFT's linear gate, ``w = h ** alpha`` with ``h = H_topK / entropy_norm`` (arXiv 2601.02151, section 3).

    Attributes:
        alpha: exponent, finite and >= 0; 0 gives w = 1 exactly.
        entropy_norm: nats; None for ``ln K``, the paper's equation. The authors' released code divides by 3.0.
            With a number h may exceed 1 and is not clamped.
    """

    alpha: float = 1.0
    entropy_norm: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha (--eaft-alpha) must be finite and >= 0, got {self.alpha}")
        norm = self.entropy_norm
        if norm is not None and not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"entropy_norm (--eaft-entropy-norm) must be finite and > 0, got {norm}")

    def check(self, topk: int) -> None:  # noqa: B027  not abstract: most gates have nothing to check
        if topk < 2 and self.entropy_norm is None:
            raise ValueError(
                f"min(topk, vocabulary) is {topk}: the entropy of one outcome is 0 and ln 1 = 0 cannot normalise it. "
                "Use topk (--eaft-topk) >= 2, or give entropy_norm (--eaft-entropy-norm)"
            )

    def weight(self, stats: TokenStats) -> Tensor:
        h = stats.normalized_entropy(self.entropy_norm)
        return h if self.alpha == 1 else h.pow(self.alpha)
