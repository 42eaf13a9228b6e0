"""``eaft-megatron landscape``: the pictures, the numbers and the page of a scored folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eaft_megatron.analysis.conflicts import conflict_examples, conflict_table, sample_rows
from eaft_megatron.analysis.html import LONGEST, page_sample, write_page
from eaft_megatron.analysis.landscape import quadrant_of, shown_weights, summarize
from eaft_megatron.analysis.plots import draw_gates, draw_plane
from eaft_megatron.analysis.tokens import ScoredTokens, read_rows, read_tokens
from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.files import write_text

PLANE, GATES, SUMMARY, PAGE = "landscape.png", "gates.png", "summary.json", "index.html"


def write_landscape(
    data: PreparedData,
    tokenizer: Any,
    output: str | os.PathLike,
    *,
    which: str = "trained",
    percentile: float = 15.0,
    samples: int = 60,
    top: int = 50,
    max_tokens: int = 20_000_000,
) -> dict[str, Any]:
    """Write ``landscape.png``, ``gates.png``, ``summary.json`` and ``index.html``; returns what the JSON holds.

    Args:
        tokenizer: the one the data was prepared with.
        output: a folder; made if need be.
        which: "trained" tokens, or "all".
        percentile: of entropy and of probability, where the corner of the conflicts ends.
        samples: rows on the page.
        top: lines of the tables of conflicts.
        max_tokens: beyond about so many, every n-th row alone is looked at.

    Raises:
        ValueError: no scores, another tokenizer, a bad percentile.
    """
    data.check_tokenizer(tokenizer)
    tokens = read_tokens(data, which=which, max_tokens=max_tokens)
    summary = {
        "data": data.path.name,
        "model": os.path.basename(os.path.normpath(tokens.record["model"]["name"])),
        "model_record": {key: value for key, value in tokens.record["model"].items() if key != "name"},
        "dtype": tokens.record["dtype"],
        "which": which,
        **summarize(tokens, percentile),
    }
    conflict = quadrant_of(tokens, summary["thresholds"]) == 0
    summary["conflict_tokens"] = conflict_table(tokens, conflict, tokenizer, top)
    summary["examples"] = conflict_examples(data, tokens, conflict, tokenizer, top)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    draw_plane(tokens, summary, output / PLANE)
    draw_gates(summary, output / GATES)
    write_text(output / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    shown = page_samples(data, tokenizer, tokens, sample_rows(tokens, conflict, samples), summary)
    write_page(output / PAGE, summary, shown, [output / PLANE, output / GATES])
    return summary


def page_samples(
    data: PreparedData, tokenizer: Any, tokens: ScoredTokens, rows: list[int], summary: dict[str, Any]
) -> list[dict[str, Any]]:
    """:func:`page_sample` of each of ``rows``, with the weights that its tokens have among ``tokens``."""
    if not rows:
        return []
    shown = read_rows(data, rows, which="all", longest=LONGEST)
    weights = shown_weights(tokens, shown, summary["percentile"])
    samples = []
    for row in rows:
        inside = shown.row == row
        of_row = {name: values[inside] for name, values in weights.items()}
        samples.append(page_sample(data, tokenizer, row, summary["thresholds"], of_row))
    return samples
