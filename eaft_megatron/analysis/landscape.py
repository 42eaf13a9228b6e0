"""Entropy against probability (arXiv 2601.02151, Figure 1b): how often the data contradicts what the model is sure of,
what each gate makes of that, and whether top-K entropy tells the truth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from eaft_megatron.analysis.tokens import ScoredTokens
from eaft_megatron.loss.gate import Gate, GateContext
from eaft_megatron.loss.gates import flow_sample_weights
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
    """Every gate of the table of methods, by the names under which they are reported."""
    compared: dict[str, Gate] = {}
    for *_, method in rows():
        for name, arguments in (method.landscape or {}).items():
            limits = {"percentile": percentile} if "percentile" in arguments else {}
            compared[name] = method.gate(**{**arguments, **limits})
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
        "gates": {name: _gate_effect(weight, quadrant, loss) for name, weight in _weights(tokens, percentile)},
        "fidelity": fidelity(tokens),
    }


def _quadrants(tokens: ScoredTokens, quadrant: np.ndarray, loss: np.ndarray) -> dict[str, dict[str, float | None]]:
    shown = {}
    for number, name in enumerate(QUADRANTS):
        inside = quadrant == number
        count = int(inside.sum())
        shown[name] = {
            "tokens": count,
            "share": count / len(tokens),
            "loss_share": _ratio(loss[inside].sum(), loss.sum()),
            "mean_loss": _ratio(loss[inside].sum(), count),
            "mean_probability": _ratio(tokens.probability[inside].sum(dtype=np.float64), count),
            "mean_entropy": _ratio(tokens.entropy[inside].sum(dtype=np.float64), count),
        }
    return shown


def _gate_effect(weight: np.ndarray, quadrant: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """What is left of the loss: ``loss_kept`` of all of it, ``kept`` of that of each quadrant, and of what is left the
    quadrants' ``loss_share``."""
    weight = weight.astype(np.float64)
    weighted = weight * loss
    sums = [(weighted[quadrant == number].sum(), loss[quadrant == number].sum()) for number in range(len(QUADRANTS))]
    return {
        "mean_weight": float(weight.mean()),
        "loss_kept": _ratio(weighted.sum(), loss.sum()),
        "kept": {name: _ratio(*pair) for name, pair in zip(QUADRANTS, sums, strict=True)},
        "loss_share": {name: _ratio(pair[0], weighted.sum()) for name, pair in zip(QUADRANTS, sums, strict=True)},
    }


def shown_weights(tokens: ScoredTokens, shown: ScoredTokens, percentile: float = 15.0) -> dict[str, np.ndarray]:
    """Gate -> ``[len(shown)]`` float32 weights of ``shown``, rows among those of ``tokens``.

    Percentiles, medians and means are those of ``tokens`` alone, as in :func:`summarize`.
    """
    return {name: weight[len(tokens) :] for name, weight in _weights(tokens, percentile, shown)}


def _weights(
    tokens: ScoredTokens, percentile: float, shown: ScoredTokens | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(gate, float32 weights of ``tokens``, then of ``shown``), all as one batch in which ``shown`` does not count.

    The model in training is the one that scored, so these are the weights of the first step: p / p_base is 1. A gate
    whose numbers were not scored is left out.
    """
    parts = [tokens] if shown is None else [tokens, shown]

    def column(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))

    loss, rows = -column("logprob"), column("row")
    valid = torch.arange(len(loss)) < len(tokens)
    squares = None if tokens.sum_p_squared is None else column("sum_p_squared")
    stats = TokenStats(loss, column("entropy"), None, valid, tokens.topk, squares)
    side = {"ref_logprob": -loss}
    if (samples := _sample_weights(loss, valid, rows)) is not None:
        side["sample_weight"] = samples
    context = GateContext(side, rows)
    for name, gate in gates(percentile).items():
        if set(gate.needs_side) <= set(side) and (squares is not None or "sum_p_squared" not in gate.needs):
            yield name, gate.weight(stats, context).numpy()


def _sample_weights(loss: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """FLOW's weight of each token's row; None where their median loss is 0: FLOW has none then."""
    _, row = rows.unique(return_inverse=True)
    means = torch.zeros(int(row.max()) + 1, dtype=torch.float64).scatter_reduce_(
        0, row[valid], loss[valid].double(), "mean", include_self=False
    )
    try:
        return flow_sample_weights(means)[row].float()
    except ValueError:
        return None


def fidelity(tokens: ScoredTokens) -> dict[str, dict[str, float | None]]:
    """For each K whose column is there: Pearson's and Spearman's correlation of top-K with full entropy.

    Empty without the full entropy (``score --full-entropy``, ``--fidelity``); None where one of them is constant.
    """
    if None not in tokens.others:
        return {}
    full = tokens.others[None].astype(np.float64)
    ranks = average_ranks(full)
    correlations = {}
    for topk in sorted(key for key in tokens.others if key is not None):
        values = tokens.others[topk].astype(np.float64)
        correlations[str(topk)] = {
            "pearson": _correlation(values, full),
            "spearman": _correlation(average_ranks(values), ranks),
            "mean_share_of_full_entropy": _ratio(values.sum(), full.sum()),
        }
    return correlations


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
