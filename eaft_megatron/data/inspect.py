"""A prepared folder for human eyes: counts, histograms, samples with the trained tokens marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.files import replacing

_TRAINED, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_BLOCKS = " ▏▎▍▌▋▊▉█"
_WIDTH = 40  # of the longest bar, in characters


def summary(data: PreparedData) -> list[str]:
    """What the folder holds, and histograms of row lengths, trained shares and how full the packs are."""
    manifest, counts = data.manifest, data.manifest["counts"]
    share = counts["trained_tokens"] / counts["tokens"]
    lines = [
        f"{data.path}: {manifest['rows']:,} rows, {counts['tokens']:,} tokens, {share:.1%} of them trained on",
        f"tokenizer {manifest['tokenizer']['name']}, inputs {', '.join(s['name'] for s in manifest['inputs'])}",
        ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items() if value),
    ]
    if data.columns():
        lines.append(f"columns: {', '.join(data.columns())}")
    for title, values, bins, unit in histograms(data):
        lines += ["", title, *_bars(values, bins, unit)]
    return lines


def histograms(data: PreparedData) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """(title, values, edges of the bins, what they count) of each histogram."""
    lengths = data.lengths
    top = int(lengths.max())
    edges = np.unique(np.geomspace(max(int(lengths.min()), 1), top + 1, 13).astype(int))
    yield "tokens in a row", lengths, edges, ""
    shares = np.array([100 * data.tokens(row)[1].mean() for row in range(len(data))])
    yield "percent of a row's tokens that are trained on", shares, np.linspace(0, 100, 11), "%"
    packing = data.manifest["packing"]
    if packing:
        filled = [100 * (lengths[data.pack(i)] - 1).sum() / packing["seq_length"] for i in range(packing["packs"])]
        yield "percent of a pack's positions that are filled", np.array(filled), np.linspace(0, 100, 11), "%"
        rows = np.array([len(data.pack(i)) for i in range(packing["packs"])])
        edges = np.unique(np.geomspace(1, rows.max() + 1, 9).astype(int))
        yield "rows in a pack", rows, edges if len(edges) > 1 else np.array([1, 2]), ""


def _bars(values: np.ndarray, edges: np.ndarray, unit: str) -> list[str]:
    counts, edges = np.histogram(values, edges)
    longest = max(int(counts.max()), 1)
    lines = []
    for count, begin, end in zip(counts, edges[:-1], edges[1:], strict=True):
        eighths = round(8 * _WIDTH * count / longest)
        bar = _BLOCKS[8] * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        lines.append(f"{begin:>8.0f} - {end:>6.0f}{unit:1} {count:>9,} {bar}")
    return lines


def sample_text(
    data: PreparedData, tokenizer: Any, *, sample: int | None = None, row: int | None = None, color: str = "auto"
) -> str:
    """One pack or row as text; what is trained on is green, or between ⟦ and ⟧ where there is no colour.

    Raises:
        ValueError: a number that the folder does not have.
    """
    colored = color == "always" or (color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    begin, end = (_TRAINED, _PLAIN) if colored else ("⟦", "⟧")
    if row is None and data.packs is None:
        row = sample
    packs = len(data.packs or ())
    what, number, size = ("row", row, len(data)) if row is not None else ("sample", sample or 0, packs)
    if not 0 <= number < size:
        raise ValueError(f"--{what} {number}: {data.path} has {what}s 0 to {size - 1}")
    rows = [number] if what == "row" else data.pack(number).tolist()
    parts = []
    for index in rows:
        ids, mask = data.tokens(index)
        trained = int(mask[1:].sum())
        parts.append(f"--- row {index}, {data[index].source}: {len(ids)} tokens, {trained} trained on")
        parts.append("".join(_marked(tokenizer, ids, mask, begin, end)))
    return "\n".join(parts)


def _marked(tokenizer: Any, ids: np.ndarray, mask: np.ndarray, begin: str, end: str) -> Iterator[str]:
    """Runs of tokens decoded together, so that characters of several tokens come out whole."""
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        text = tokenizer.decode(ids[start:stop].tolist(), clean_up_tokenization_spaces=False)
        yield f"{begin}{text}{end}" if mask[start] else text


def draw(data: PreparedData, path: str | os.PathLike) -> None:
    """The histograms as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(histograms(data))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (title, values, edges, _) in zip(np.atleast_1d(axes), panels, strict=True):
        axis.hist(values, bins=edges, color="#3b6ea5")
        axis.set_title(title, fontsize=9)
        if edges[-1] > 200:
            axis.set_xscale("log")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    pyplot.close(figure)
