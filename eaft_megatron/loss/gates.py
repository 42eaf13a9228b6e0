"""Gates: what each method makes of a token's statistics.

A gate turns :class:`TokenStats` into two detached numbers per token: the loss, and its slope with respect to the
cross entropy. The backward pass is then ``slope * (softmax - onehot)`` for every method. A reweighting method has
``loss = weight * ce`` and ``slope = weight``; it subclasses :class:`Gate` and writes one method, ``weight``.

Where a paper leaves something open, the docstring says what was chosen: first what the authors' code does, else ours.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from eaft_megatron.loss.batch_statistics import batch_quantile, median_of_sequence_means
from eaft_megatron.loss.gate import Gate, GateContext, GateOutput, check_number
from eaft_megatron.loss.token_stats import TokenStats

_SFT_KL_CLAMP = 20.0  # verl clamps the log-ratio of its k3 estimator here


@dataclasses.dataclass(frozen=True)
class SFTGate(Gate):
    """Plain supervised fine-tuning: every token has weight 1."""

    uses_probability: ClassVar[bool] = False

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return torch.ones_like(stats.ce)


@dataclasses.dataclass(frozen=True)
class EntropyGate(Gate):
    """Base of the gates on ``h = H_topK / entropy_norm``.

    Attributes:
        entropy_norm: nats; None for ``ln K``, the paper's equation. The authors' released code divides by 3.0.
            With a number h may exceed 1 and is not clamped.
    """

    entropy_norm: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    uses_probability: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.entropy_norm is not None:
            check_number(
                self.entropy_norm > 0, "entropy_norm (--eaft-entropy-norm) must be finite and > 0", self.entropy_norm
            )

    def check(self, topk: int) -> None:
        if topk < 2 and self.entropy_norm is None:
            raise ValueError(
                f"min(topk, vocabulary) is {topk}: the entropy of one outcome is 0 and ln 1 = 0 cannot normalise it. "
                "Use topk (--eaft-topk) >= 2, or give entropy_norm (--eaft-entropy-norm)"
            )


@dataclasses.dataclass(frozen=True)
class EAFTGate(EntropyGate):
    """EAFT's linear gate, ``w = h ** alpha`` (arXiv 2601.02151, section 3; alpha 2 and 3 are its polynomial gates).

    The paper does not say that the weight is detached; the authors' code detaches it.

    Attributes:
        alpha: exponent, finite and >= 0; 0 gives w = 1 exactly.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.alpha >= 0, "alpha (--eaft-alpha) must be finite and >= 0", self.alpha)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        h = stats.normalized_entropy(self.entropy_norm)
        return h if self.alpha == 1 else h.pow(self.alpha)


@dataclasses.dataclass(frozen=True)
class SigmoidGate(EntropyGate):
    """EAFT's sigmoid gate, ``w = sigmoid(steepness * (h - centre))`` (arXiv 2601.02151: 30 and 0.17)."""

    steepness: float = 30.0
    centre: float = 0.17

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.steepness > 0, "steepness must be finite and > 0", self.steepness)
        check_number(True, "centre must be finite", self.centre)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return torch.sigmoid(self.steepness * (stats.normalized_entropy(self.entropy_norm) - self.centre))


@dataclasses.dataclass(frozen=True)
class ThresholdGate(EntropyGate):
    """EAFT's hard gate, "masked SFT": ``w = 1[h > threshold]`` (arXiv 2601.02151).

    Give one of the two. The paper uses the 15th percentile and does not say of what; ours is that of the valid tokens
    of one micro-batch over ``reduce_group``, linearly interpolated.

    Attributes:
        threshold: on h.
        percentile: in [0, 100].
    """

    threshold: float | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.threshold is None) == (self.percentile is None):
            raise ValueError(
                "the threshold gate takes one of threshold (--eaft-threshold) and percentile (--eaft-percentile)"
            )
        if self.threshold is not None:
            check_number(True, "threshold (--eaft-threshold) must be finite", self.threshold)
        if self.percentile is not None:
            _check_percentile(self.percentile)

    @property
    def needs_batch(self) -> bool:
        return self.percentile is not None

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        h = stats.normalized_entropy(self.entropy_norm)
        if self.threshold is not None:
            return (h > self.threshold).to(h.dtype)
        assert self.percentile is not None
        (limit,) = batch_quantile([h], stats.valid, self.percentile / 100, context.reduce_group)
        return (h > limit).to(h.dtype)


CONFLICT_ENTROPY = 0.17
"""A token is a confident conflict below this normalised entropy (the centre of the paper's sigmoid) ..."""
CONFLICT_PROBABILITY = 0.1
"""... and below this probability of its label."""


def confident_conflicts(
    stats: TokenStats,
    entropy: float = CONFLICT_ENTROPY,
    probability: float = CONFLICT_PROBABILITY,
    *,
    entropy_norm: float | None = None,
) -> Tensor:
    """Bool, shaped like ``stats.ce``: h < ``entropy`` and p < ``probability``. Meaningless at ignored tokens."""
    return (stats.normalized_entropy(entropy_norm) < entropy) & (stats.probability < probability)


@dataclasses.dataclass(frozen=True)
class ConflictMaskGate(EntropyGate):
    """The paper's pilot: weight 0 where H and p are both below a limit, else 1 (arXiv 2601.02151).

    The paper's limits are percentiles (15); it does not say of what, nor whether H is the top-K entropy. Ours are those
    of the valid tokens of one micro-batch over ``reduce_group``, and H is. Fixed limits are our own: a percentile
    always masks something, they mask nothing where nothing contradicts what the model is sure of.

    Attributes:
        percentile: in [0, 100]; None for fixed limits. 15 where nothing is given.
        conflict_entropy: fixed limit on h = H / entropy_norm, with ``conflict_probability``; the metric
            ``eaft conflict rate`` counts below 0.17 and 0.1.
        conflict_probability: fixed limit on p.
    """

    percentile: float | None = None
    conflict_entropy: float | None = None
    conflict_probability: float | None = None
    uses_probability: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        entropy, probability = self.conflict_entropy, self.conflict_probability
        if entropy is None and probability is None:
            percentile = 15.0 if self.percentile is None else self.percentile
            _check_percentile(percentile)
            object.__setattr__(self, "percentile", percentile)
        elif self.percentile is not None or entropy is None or probability is None:
            raise ValueError(
                "the conflict mask takes percentile (--eaft-percentile), or conflict_entropy (--eaft-conflict-entropy) "
                "and conflict_probability (--eaft-conflict-probability) together"
            )
        else:
            check_number(entropy >= 0, "conflict_entropy (--eaft-conflict-entropy) must be finite and >= 0", entropy)
            check_number(
                0 <= probability <= 1,
                "conflict_probability (--eaft-conflict-probability) must lie in [0, 1]",
                probability,
            )

    @property
    def needs_batch(self) -> bool:
        return self.percentile is not None

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        if self.conflict_entropy is not None and self.conflict_probability is not None:
            limits = self.conflict_entropy, self.conflict_probability
            conflict = confident_conflicts(stats, *limits, entropy_norm=self.entropy_norm)
        else:
            assert stats.entropy is not None and self.percentile is not None
            columns = [stats.entropy, stats.probability]
            lowest = batch_quantile(columns, stats.valid, self.percentile / 100, context.reduce_group)
            conflict = (columns[0] < lowest[0]) & (columns[1] < lowest[1])
        return (~conflict).to(stats.ce.dtype)


@dataclasses.dataclass(frozen=True)
class DFTGate(Gate):
    """Dynamic fine-tuning: ``w = p_t``, detached (arXiv 2508.05629, equation 9)."""

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return stats.probability


@dataclasses.dataclass(frozen=True)
class TALRGate(Gate):
    """Token-adaptive loss reweighting: ``w = max(p_t ** (1 / tau), min_weight)`` (arXiv 2509.20758).

    Attributes:
        tau: None for the median over sequences of their mean cross entropy, at least 1e-6; the mean of the two middle
            ones when their number is even. The sequences are those of one micro-batch over ``reduce_group``: the
            paper says "batch", and that is what is known when the loss is computed. 1 where no sequence has a finite
            mean.
        min_weight: floor of the weight.
    """

    tau: float | None = None
    min_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.tau is not None:
            check_number(self.tau > 0, "tau (--talr-tau) must be finite and > 0", self.tau)
        check_number(0 <= self.min_weight <= 1, "min_weight (--talr-min-weight) must lie in [0, 1]", self.min_weight)

    @property
    def needs_sequence_ids(self) -> bool:
        return self.tau is None

    @property
    def needs_batch(self) -> bool:
        return self.tau is None

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        tau: float | Tensor | None = self.tau
        if tau is None:
            assert context.sequence_ids is not None
            tau = median_of_sequence_means(stats.ce, stats.valid, context.sequence_ids, context.reduce_group)
            tau = torch.where(tau.isnan(), 1.0, tau.clamp(min=1e-6))
        return (-stats.ce / tau).exp().clamp(min=self.min_weight)


@dataclasses.dataclass(frozen=True)
class FLOWGate(Gate):
    """Sample weights fixed before training (arXiv 2502.02797): side column ``sample_weight``, one value per sample.

    :func:`flow_sample_weights` computes them from the frozen base model's losses.
    """

    needs_side: ClassVar[tuple[str, ...]] = ("sample_weight",)
    uses_probability: ClassVar[bool] = False

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return context.side["sample_weight"]


@dataclasses.dataclass(frozen=True)
class SFTKLGate(Gate):
    """SFT with a KL penalty to the frozen base model (the paper's SFT-KL baseline, beta 0.5).

    ``loss = ce + beta * k3`` on the target token, ``k3 = exp(d) - d - 1`` with ``d = logp_ref - logp`` clamped to
    [-20, 20]; slope ``1 + beta * (exp(d) - 1)``, 1 where clamped. The paper does not name the estimator; this is that
    of verl, on which the authors build. The weight reported is 1. Side column ``ref_logprob``: the base model's
    log-probability of the target.
    """

    beta: float = 0.5
    needs_side: ClassVar[tuple[str, ...]] = ("ref_logprob",)
    uses_probability: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self.beta >= 0, "beta (--sft-kl-beta) must be finite and >= 0", self.beta)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return torch.ones_like(stats.ce)

    def __call__(self, stats: TokenStats, context: GateContext) -> GateOutput:
        return with_k3_penalty(super().__call__(stats, context), stats, context.side["ref_logprob"], self.beta)


def with_k3_penalty(output: GateOutput, stats: TokenStats, ref_logprob: Tensor, beta: float) -> GateOutput:
    """``output`` with ``beta * k3`` added, ``k3 = exp(d) - d - 1``, ``d = logp_ref - logp`` clamped to [-20, 20]."""
    ratio = ref_logprob.to(stats.ce.dtype) + stats.ce
    ratio = torch.where(torch.isposinf(stats.ce), stats.ce, ratio)  # p = 0, whatever the base model thinks
    d = ratio.clamp(-_SFT_KL_CLAMP, _SFT_KL_CLAMP)
    excess = torch.expm1(d)
    added = torch.where(stats.valid, beta * (excess - d), 0)
    slope = torch.where(stats.valid & ~(ratio.abs() > _SFT_KL_CLAMP), beta * excess, 0)
    return GateOutput(output.loss + added, output.slope + slope, output.weight)


def flow_sample_weights(sample_losses: Tensor) -> Tensor:
    """``exp(-f_i / median(f))`` for FLOW (arXiv 2502.02797), from the frozen base model's mean loss on each sample.

    Args:
        sample_losses: ``[samples]`` floating point, finite and >= 0, not all zero in the upper half.

    Returns:
        ``[samples]``, same dtype. The median is the mean of the two middle ones when their number is even.

    Raises:
        ValueError: no samples, a negative or non-finite loss, or a median of 0.
    """
    if sample_losses.dim() != 1 or sample_losses.numel() == 0:
        raise ValueError(f"sample_losses must be a non-empty vector, got shape {tuple(sample_losses.shape)}")
    if not bool((sample_losses.isfinite() & (sample_losses >= 0)).all()):
        raise ValueError("sample_losses must be finite and >= 0")
    ordered = sample_losses.double().sort().values  # torch.quantile refuses long inputs
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    if median == 0:
        raise ValueError("the median of sample_losses is 0: FLOW's temperature would be 0")
    return (-sample_losses / median).exp().to(sample_losses.dtype)


def _check_percentile(value: float) -> None:
    check_number(0 <= value <= 100, "percentile (--eaft-percentile) must lie in [0, 100]", value)
