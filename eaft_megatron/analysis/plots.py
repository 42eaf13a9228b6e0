"""The landscape as pictures."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from eaft_megatron.analysis.landscape import QUADRANTS
from eaft_megatron.analysis.tokens import ScoredTokens
from eaft_megatron.files import replacing

_COLORS = {"conflict": "#d95f02", "low_entropy": "#1b9e77", "low_probability": "#7570b3", "neither": "#bdbdbd"}
_MIN_ENTROPY, _MIN_PROBABILITY = 1e-6, 1e-9  # where the logarithmic axes begin


def draw_plane(tokens: ScoredTokens, summary: dict[str, Any], path: str | os.PathLike) -> None:
    """Probability over entropy, log counts: on the paper's linear axes, and on logarithmic ones, where the corner of
    the confident conflicts can be seen."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    entropy, probability = np.maximum(tokens.entropy, 0), tokens.probability
    extent = (0, max(np.log(tokens.topk), float(entropy.max())), 0, 1)
    shown = axes[0].hexbin(
        entropy, probability, gridsize=70, bins="log", mincnt=1, cmap="viridis", linewidths=0, extent=extent
    )
    low = np.log10(np.maximum(entropy, _MIN_ENTROPY)), np.log10(np.maximum(probability, _MIN_PROBABILITY))
    axes[1].hexbin(
        10 ** low[0], 10 ** low[1], gridsize=70, bins="log", mincnt=1, cmap="viridis", xscale="log", yscale="log",
        linewidths=0,
    )  # fmt: skip
    figure.colorbar(shown, ax=axes, label="tokens", pad=0.01)
    for axis in axes:
        _mark_corner(axis, summary)
        axis.set_xlabel(f"top-{tokens.topk} entropy (nats)")
        axis.set_ylabel("probability of the token")
    _annotate(axes[0], summary)
    _write_shares(axes[1], summary)
    axes[0].set_title("linear axes", fontsize=10)
    axes[1].set_title("logarithmic axes", fontsize=10)
    figure.suptitle(
        f"{summary['tokens']:,} tokens of {os.path.basename(str(summary['data']))}, "
        f"{os.path.basename(str(summary['model']))}; lines at the {summary['percentile']:g}th percentiles",
        fontsize=11,
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100)
    pyplot.close(figure)


def _mark_corner(axis: Any, summary: dict[str, Any]) -> None:
    limits = summary["thresholds"]
    axis.axvline(limits["entropy"], color="black", linewidth=0.8, linestyle="--")
    axis.axhline(limits["probability"], color="black", linewidth=0.8, linestyle="--")
    left, bottom = axis.get_xlim()[0], axis.get_ylim()[0]
    axis.fill_between([left, limits["entropy"]], bottom, limits["probability"], color=_COLORS["conflict"], alpha=0.25)
    axis.set_xlim(left=left)
    axis.set_ylim(bottom=bottom)


def _annotate(axis: Any, summary: dict[str, Any]) -> None:
    found, limits = summary["quadrants"]["conflict"], summary["thresholds"]
    axis.annotate(
        f"confident conflicts: {found['share']:.2%} of tokens,\n{found['loss_share'] or 0:.2%} of the loss",
        xy=(limits["entropy"], limits["probability"]),
        xytext=(0.5, 0.87),
        textcoords="axes fraction",
        arrowprops={"arrowstyle": "->", "color": _COLORS["conflict"]},
        fontsize=9,
        bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": _COLORS["conflict"]},
    )


def _write_shares(axis: Any, summary: dict[str, Any]) -> None:
    corners = {"conflict": (0.02, 0.03), "low_entropy": (0.02, 0.97), "low_probability": (0.98, 0.03)}
    for name, found in summary["quadrants"].items():
        x, y = corners.get(name, (0.98, 0.97))
        axis.text(
            x,
            y,
            f"{found['share']:.2%} of tokens\n{found['loss_share'] or 0:.2%} of loss",
            transform=axis.transAxes,
            ha="left" if x < 0.5 else "right",
            va="bottom" if y < 0.5 else "top",
            fontsize=8,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": _COLORS[name], "alpha": 0.85},
        )


def draw_gates(summary: dict[str, Any], path: str | os.PathLike) -> None:
    """Loss mass that each gate leaves (sft: all of it), by quadrant; 100% is the cross entropy of all tokens."""
    pyplot = _pyplot()
    before = {name: found["loss_share"] or 0 for name, found in summary["quadrants"].items()}
    bars = {
        name: {part: before[part] * (effect["kept"][part] or 0) for part in QUADRANTS}
        for name, effect in summary["gates"].items()
    }
    figure, axis = pyplot.subplots(figsize=(8, 1.5 + 0.28 * len(bars)), layout="constrained")
    left = np.zeros(len(bars))
    for part, text in QUADRANTS.items():
        widths = np.array([100 * bar[part] for bar in bars.values()])
        axis.barh(list(bars), widths, left=left, color=_COLORS[part], label=text)
        left += widths
    for number, total in enumerate(left):
        axis.text(total + 0.5, number, f"{total:.1f}%", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * left.max())
    axis.set_xlabel("percent of the cross entropy that is left, and where it lies")
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
