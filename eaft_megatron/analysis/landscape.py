"""Entropy against probability (arXiv 2601.02151, Figure 1b): how often the data contradicts what the model is sure of,
what each gate makes of that, and whether top-K entropy tells the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eaft_megatron.analysis.tokens import ScoredTokens
from eaft_megatron.loss.gates import Gate, GateContext
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.methods import rows

QUADRANTS = {
    "conflict": "confident conflict: low entropy, low probability",
    "low_entropy": "low entropy, other probability",
    "low_probability": "other entropy, low probability",
    "neither": "other entropy, other probability",
}
"""Low means strictly below the percentile, as in the conflict mask."""


def gates(percentile: float) -> dict[str, Gate]:
    """The gates of the table of methods that are compared, by the names under which they are reported."""
    compared: dict[str, Gate] = {}
    for *_, method in rows():
        for name, arguments in (method.landscape or {}).items():
            own = {"percentile": percentile} if "percentile" in arguments else {}
            compared[name] = method.gate(**{**arguments, **own})
    return compared


def thresholds(tokens: ScoredTokens, percentile: float) -> dict[str, float]:
    """``entropy`` and ``probability`` at the percentile of all tokens, linearly interpolated."""
    return {
        "entropy": float(np.percentile(tokens.entropy.astype(np.float64), percentile)),
        "probability": float(np.percentile(np.exp(tokens.logprob.astype(np.float64)), percentile)),
    }


def quadrant_of(tokens: ScoredTokens, limits: dict[str, float]) -> np.ndarray:
    """``[n]`` int8: which of :data:`QUADRANTS`, by number."""
    low_entropy = tokens.entropy < limits["entropy"]
    low_probability = np.exp(tokens.logprob.astype(np.float64)) < limits["probability"]
    return np.select([low_entropy & low_probability, low_entropy, low_probability], [0, 1, 2], 3).astype(np.int8)


def summarize(tokens: ScoredTokens, percentile: float = 15.0) -> dict[str, Any]:
    """Every number of the landscape. Shares lie in [0, 1], entropies and losses are in nats.

    The percentiles are those of all tokens together, where a training run knows one micro-batch alone.

    Raises:
        ValueError: a percentile outside [0, 100].
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"--percentile must lie in [0, 100], got {percentile}")
    limits = thresholds(tokens, percentile)
    quadrant = quadrant_of(tokens, limits)
    loss = -tokens.logprob.astype(np.float64)
    return {
        "tokens": len(tokens),
        "rows": tokens.rows,
        "topk": tokens.topk,
        "percentile": percentile,
        "thresholds": limits,
        "mean_loss": float(loss.mean()),
        "mean_entropy": float(tokens.entropy.mean(dtype=np.float64)),
        "mean_probability": float(tokens.probability.mean(dtype=np.float64)),
        "quadrants": _quadrants(tokens, quadrant, loss),
        "gates": {name: _gate_effect(gate, tokens, quadrant, loss) for name, gate in gates(percentile).items()},
        "fidelity": fidelity(tokens),
    }


def _quadrants(tokens: ScoredTokens, quadrant: np.ndarray, loss: np.ndarray) -> dict[str, dict[str, float | None]]:
    found = {}
    for number, name in enumerate(QUADRANTS):
        inside = quadrant == number
        count = int(inside.sum())
        found[name] = {
            "tokens": count,
            "share": count / len(tokens),
            "loss_share": _ratio(loss[inside].sum(), loss.sum()),
            "mean_loss": _ratio(loss[inside].sum(), count),
            "mean_probability": _ratio(tokens.probability[inside].sum(dtype=np.float64), count),
            "mean_entropy": _ratio(tokens.entropy[inside].sum(dtype=np.float64), count),
        }
    return found


def _gate_effect(gate: Gate, tokens: ScoredTokens, quadrant: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """What is left of the loss: ``loss_kept`` of all of it, ``kept`` of that of each quadrant, and of what is left the
    quadrants' ``loss_share``."""
    weight = gate_weights(gate, tokens).astype(np.float64)
    weighted = weight * loss
    sums = [(weighted[quadrant == number].sum(), loss[quadrant == number].sum()) for number in range(len(QUADRANTS))]
    return {
        "mean_weight": float(weight.mean()),
        "loss_kept": _ratio(weighted.sum(), loss.sum()),
        "kept": {name: _ratio(*pair) for name, pair in zip(QUADRANTS, sums, strict=True)},
        "loss_share": {name: _ratio(pair[0], weighted.sum()) for name, pair in zip(QUADRANTS, sums, strict=True)},
    }


def gate_weights(gate: Gate, tokens: ScoredTokens) -> np.ndarray:
    """``[n]`` float32: the weight that a gate gives each token, all of them taken as one batch."""
    loss = torch.from_numpy(-tokens.logprob)
    valid = torch.ones(len(tokens), dtype=torch.bool)
    stats = TokenStats(loss, torch.from_numpy(tokens.entropy), None, valid, tokens.topk)
    return gate.weight(stats, GateContext()).numpy()


def fidelity(tokens: ScoredTokens) -> dict[str, dict[str, float | None]]:
    """For each K whose column is there: Pearson's and Spearman's correlation of top-K with full entropy.

    Empty without the full entropy (``score --full-entropy``, ``--fidelity``); None where one of them is constant.
    """
    if None not in tokens.others:
        return {}
    full = tokens.others[None].astype(np.float64)
    ranks = average_ranks(full)
    found = {}
    for topk in sorted(key for key in tokens.others if key is not None):
        values = tokens.others[topk].astype(np.float64)
        found[str(topk)] = {
            "pearson": _correlation(values, full),
            "spearman": _correlation(average_ranks(values), ranks),
            "mean_share_of_full_entropy": _ratio(values.sum(), full.sum()),
        }
    return found


def average_ranks(values: np.ndarray) -> np.ndarray:
    """``[n]`` float64: ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    return _ratio((a * b).sum(), np.sqrt((a * a).sum() * (b * b).sum()))


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if b else None
