"""Gates that compare the model with the frozen model it started from.

Each reads the side column ``ref_logprob``, the base model's log-probability of the target: ``eaft-megatron score``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from eaft_megatron.loss.batch_statistics import sequence_means
from eaft_megatron.loss.gate import Gate, GateContext, GateOutput, check_number
from eaft_megatron.loss.gates import with_k3_penalty
from eaft_megatron.loss.token_stats import TokenStats


class BaseModelGate(Gate):
    """Base of the gates here."""

    needs_side: ClassVar[tuple[str, ...]] = ("ref_logprob",)


def _log_ratio(stats: TokenStats, context: GateContext) -> Tensor:
    """``[N]`` log p - log p_ref of the targets."""
    return -stats.ce - context.side["ref_logprob"].to(stats.ce.dtype)


@dataclasses.dataclass(frozen=True)
class ASFTGate(BaseModelGate):
    """DFT with an anchor: ``loss = p * ce + kl * k3`` with p detached (ASFT, arXiv 2509.23753).

    The authors' code takes the KL divergence over the whole vocabulary, KL(base || model). That needs the base model's
    whole distribution; ``k3 = exp(d) - d - 1``, ``d = logp_ref - logp`` of the target alone, is the variant proposed
    for NeMo-RL. It estimates the other direction, KL(model || base), and on given labels is a penalty rather than an
    unbiased estimate: slope ``p + kl * (exp(d) - 1)``, which pulls p towards p_ref from both sides. d is clamped to
    [-20, 20], where the penalty's slope is 0; NeMo-RL also clamps k3 to 10, which would turn the anchor off where
    p_ref > 13.6 p, and is left out.

    Attributes:
        kl: weight of the penalty; 0 is DFT. 0.05 is the README's of the authors, whose code defaults to 0.1; neither
            carries over to another estimator. NeMo-RL's proposal has 0.03 and warns of 0.05 and more.
    """

    kl: float = 0.05

    def __post_init__(self) -> None:
        check_number(self.kl >= 0, "kl (--asft-kl) must be finite and >= 0", self.kl)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return stats.probability

    def __call__(self, stats: TokenStats, context: GateContext) -> GateOutput:
        return with_k3_penalty(super().__call__(stats, context), stats, context.side["ref_logprob"], self.kl)


@dataclasses.dataclass(frozen=True)
class PSFTGate(BaseModelGate):
    """Proximal SFT against the base model: ``w = r * 1[r < 1 + clip]``, ``r = p / p_ref`` (our variant).

    Objective of PSFT's code (arXiv 2508.17784): ``-min(r, 1 + clip)``, whose gradient this is; the lower clip of PPO
    never acts, for the advantage is 1. But there, and in OPC-SFT (clip 0.5), r is relative to the model of a few
    updates ago, which is renewed as training goes on. Here p_ref is that of the frozen base model: a token's own
    gradient stops for good once p has grown by the factor 1 + clip.

    Attributes:
        clip: 0.28 in PSFT's released run; > 0.
    """

    clip: float = 0.28

    def __post_init__(self) -> None:
        check_number(self.clip > 0, "clip (--psft-clip) must be finite and > 0", self.clip)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        ratio = _log_ratio(stats, context).exp()
        return torch.where(ratio >= 1 + self.clip, 0, ratio)


@dataclasses.dataclass(frozen=True)
class STMGate(BaseModelGate):
    """Selective token masking: ``w = 0`` where the base model's ``1 / p_ref > perplexity``, else 1 (arXiv 2501.14315).

    The authors take masked tokens out of the mean; here it stays over all valid tokens, which makes a step smaller.

    Attributes:
        perplexity: 2.5 in the paper and its code; >= 1.
    """

    perplexity: float = 2.5

    def __post_init__(self) -> None:
        check_number(self.perplexity >= 1, "perplexity (--stm-perplexity) must be finite and >= 1", self.perplexity)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        reference = context.side["ref_logprob"].to(stats.ce.dtype)
        # A NaN is no reason to mask: it surfaces.
        return torch.where(-reference > math.log(self.perplexity), 0, torch.ones_like(stats.ce))


@dataclasses.dataclass(frozen=True)
class IWSFTGate(BaseModelGate):
    """Importance-weighted SFT: one weight a sequence, or one a token (iw-SFT, arXiv 2507.12856).

    ``level`` "sequence": ``w = min(exp(temperature * mean(logp - logp_ref)), 16)``, the mean over the sequence's valid
    tokens, wherever in ``reduce_group`` they lie. "token": ``w = clamp(p / p_ref, 0.2, 1.8)``. Both are those of the
    authors' code, where "token" is never called and rows are not packed. The weights are not normalised.

    Attributes:
        level: "sequence" or "token".
        temperature: of "sequence", >= 0. The authors' run has 1.0; 2.0 is only an unused default of their function.
    """

    level: str = "sequence"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level (--iw-sft-level) must be sequence or token, got {self.level!r}")
        check_number(
            self.temperature >= 0, "temperature (--iw-sft-temperature) must be finite and >= 0", self.temperature
        )
        if self.level == "token" and self.temperature != 1:
            raise ValueError("temperature (--iw-sft-temperature) is for --iw-sft-level sequence: remove it")

    @property
    def needs_sequence_ids(self) -> bool:
        return self.level == "sequence"

    @property
    def needs_batch(self) -> bool:
        return self.level == "sequence"

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        ratio = _log_ratio(stats, context)
        if self.level == "token":
            return ratio.exp().clamp(0.2, 1.8)
        assert context.sequence_ids is not None
        mean = sequence_means(ratio, stats.valid, context.sequence_ids, context.reduce_group)
        return (self.temperature * mean).exp().clamp(max=16)
