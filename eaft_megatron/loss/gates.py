"""Gates: what each method makes of a token's statistics.

A gate turns :class:`TokenStats` into two detached numbers per token: the loss, and its slope with respect to the
cross entropy. The backward pass is then ``slope * (softmax - onehot)`` for every method. A reweighting method has
``loss = weight * ce`` and ``slope = weight``; it subclasses :class:`Gate` and writes one method, ``weight``.

Where a paper leaves something open, the docstring says what was chosen: first what the authors' code does, else ours.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.batch_statistics import batch_quantile, median_of_sequence_means
from eaft_megatron.loss.token_stats import TokenStats

_SFT_KL_CLAMP = 20.0  # verl clamps the log-ratio of its k3 estimator here


class GateOutput(NamedTuple):
    """Per token, flat: the loss, d loss / d ce, and the weight to report. All detached."""

    loss: Tensor
    slope: Tensor
    weight: Tensor


@dataclasses.dataclass(frozen=True)
class GateContext:
    """What a gate may use beyond the statistics. Every tensor is flat, one entry per token.

    Attributes:
        side: extra columns by name.
        sequence_ids: int64; tokens with one id belong to one sequence, wherever in ``reduce_group`` they are.
        reduce_group: data x context parallel group for statistics of the batch; None for this process alone.
    """

    side: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    sequence_ids: Tensor | None = None
    reduce_group: dist.ProcessGroup | None = None


class Gate(abc.ABC):
    """Base of all gates. Instances are frozen dataclasses holding plain numbers.

    Attributes:
        needs: which optional fields of :class:`TokenStats` must be filled: ``"entropy"``, ``"sum_p_squared"``.
        needs_side: names of the side columns the gate reads.
        needs_sequence_ids: whether it reads ``sequence_ids``.
        needs_batch: whether it takes statistics over ``reduce_group``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_side: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_sequence_ids(self) -> bool:
        """See above."""
        return False

    @property
    def needs_batch(self) -> bool:
        """See above."""
        return False

    def check(self, topk: int) -> None:  # noqa: B027  not abstract: most gates have nothing to check
        """Raise ``ValueError`` if the gate cannot work with this K = min(topk, V); the default accepts any."""

    @abc.abstractmethod
    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        """``[N]`` weight of each token. Values at ignored tokens do not matter."""

    def __call__(self, stats: TokenStats, context: GateContext) -> GateOutput:
        """Weight the cross entropy. A target with p = 0 has an infinite loss, also where its weight is 0."""
        weight = torch.where(stats.valid, self.weight(stats, context).to(stats.ce.dtype), 0)
        loss = torch.where(torch.isposinf(stats.ce), stats.ce, weight * stats.ce)
        return GateOutput(loss, weight, weight)


@dataclasses.dataclass(frozen=True)
class SFTGate(Gate):
    """Plain supervised fine-tuning: every token has weight 1."""

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

    def __post_init__(self) -> None:
        if self.entropy_norm is not None:
            _check(
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
        _check(self.alpha >= 0, "alpha (--eaft-alpha) must be finite and >= 0", self.alpha)

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
        _check(self.steepness > 0, "steepness must be finite and > 0", self.steepness)
        _check(True, "centre must be finite", self.centre)

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
            _check(True, "threshold (--eaft-threshold) must be finite", self.threshold)
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


@dataclasses.dataclass(frozen=True)
class ConflictMaskGate(EntropyGate):
    """The paper's pilot: weight 0 where H and p are both below their percentiles, else 1 (arXiv 2601.02151).

    The scope of the percentiles is that of :class:`ThresholdGate`.
    """

    percentile: float = 15.0

    @property
    def needs_batch(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_percentile(self.percentile)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        columns = [stats.normalized_entropy(1.0), stats.probability]
        limits = batch_quantile(columns, stats.valid, self.percentile / 100, context.reduce_group)
        conflict = (columns[0] < limits[0]) & (columns[1] < limits[1])
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
            _check(self.tau > 0, "tau (--talr-tau) must be finite and > 0", self.tau)
        _check(0 <= self.min_weight <= 1, "min_weight (--talr-min-weight) must lie in [0, 1]", self.min_weight)

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

    def __post_init__(self) -> None:
        _check(self.beta >= 0, "beta (--sft-kl-beta) must be finite and >= 0", self.beta)

    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        return torch.ones_like(stats.ce)

    def __call__(self, stats: TokenStats, context: GateContext) -> GateOutput:
        ratio = context.side["ref_logprob"].to(stats.ce.dtype) + stats.ce
        ratio = torch.where(torch.isposinf(stats.ce), stats.ce, ratio)  # p = 0, whatever the base model thinks
        d = ratio.clamp(-_SFT_KL_CLAMP, _SFT_KL_CLAMP)
        excess = torch.expm1(d)
        loss = stats.ce + self.beta * (excess - d)
        slope = torch.where(ratio.abs() > _SFT_KL_CLAMP, 1.0, 1 + self.beta * excess)
        weight = stats.valid.to(stats.ce.dtype)
        return GateOutput(torch.where(stats.valid, loss, 0), torch.where(stats.valid, slope, 0), weight)


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


def _check(condition: bool, message: str, value: float) -> None:
    if not (math.isfinite(value) and condition):
        raise ValueError(f"{message}, got {value}")


def _check_percentile(value: float) -> None:
    _check(0 <= value <= 100, "percentile (--eaft-percentile) must lie in [0, 100]", value)
