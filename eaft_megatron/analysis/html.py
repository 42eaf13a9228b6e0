"""The landscape as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from eaft_megatron.analysis.conflicts import token_texts
from eaft_megatron.analysis.landscape import QUADRANTS
from eaft_megatron.analysis.page import PAGE
from eaft_megatron.analysis.token_scores import LOGPROB, TOPK_ENTROPY
from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.files import write_text

LONGEST = 2048
"""Tokens shown of a row."""


def page_sample(
    data: PreparedData, tokenizer: Any, row: int, limits: dict[str, float], weights: dict[str, np.ndarray]
) -> dict[str, Any]:
    """One row for the page.

    Args:
        limits: "entropy" (nats) and "probability", below which a trained token is a conflict.
        weights: gate -> weight of each token shown but the first.

    Returns:
        ``texts``, ``p``, ``h`` (nats) and ``trained`` of each token, ``conflict``: the places of those that conflict,
        ``w``: gate -> weights, one number where all are equal. The first token has no p, h and weight (null).
    """
    sample = data[row]
    ids, trained = sample.input_ids[:LONGEST], sample.labels_mask[:LONGEST]
    logprob, entropy = (data.column(name, row)[: len(ids)].astype(np.float64) for name in (LOGPROB, TOPK_ENTROPY))
    probability = np.exp(logprob)
    conflict = (entropy < limits["entropy"]) & (probability < limits["probability"]) & trained
    conflict[:1] = False
    return {
        "row": row,
        "source": os.path.basename(sample.source),
        "tokens": int(data.lengths[row]),
        "conflict": np.flatnonzero(conflict).tolist(),
        "texts": token_texts(tokenizer, ids.tolist()),
        "p": [None, *_short(probability[1:], 5)],
        "h": [None, *_short(entropy[1:], 5)],
        "w": {name: _weights(values) for name, values in weights.items()},
        "trained": [int(flag) for flag in trained],
    }


def _weights(values: np.ndarray) -> float | list[float | None]:
    short = _short(values, 4)
    return short[0] if len(set(short)) == 1 else [None, *short]


def _short(values: np.ndarray, digits: int) -> list[float]:
    """As few characters as will do: 0 and 1 without a point."""
    numbers = [float(f"{value:.{digits}g}") for value in values]
    return [int(number) if number.is_integer() else number for number in numbers]


def write_page(path: str | os.PathLike, summary: dict[str, Any], samples: list[dict[str, Any]], pictures: list) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        summary: :func:`~eaft_megatron.analysis.landscape.summarize` with "data", "model", "conflict_tokens" and
            "examples".
        samples: of :func:`page_sample`.
        pictures: PNG files, which become part of the page.
    """
    content = {"gates": list(summary["gates"]), "samples": samples}
    # "</script>" or "<!--" in a sample would end the element.
    packed = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    encoded = [base64.b64encode(Path(picture).read_bytes()).decode() for picture in pictures]
    parts = {
        "TITLE": html.escape(f"Landscape of {os.path.basename(str(summary['data']))}"),
        "FACTS": _facts(summary),
        "PICTURES": "".join(f'<img alt="" src="data:image/png;base64,{picture}">' for picture in encoded),
        "TABLES": _tables(summary),
        "CONTENT": packed,
    }
    page = re.sub(rf"@({'|'.join(parts)})@", lambda match: parts[match[1]], PAGE)
    write_text(path, page)


def _facts(summary: dict[str, Any]) -> str:
    limits, conflict = summary["thresholds"], summary["quadrants"]["conflict"]
    return (
        f"<p>{summary['tokens']:,} tokens of <b>{html.escape(str(summary['data']))}</b>, scored by "
        f"<b>{html.escape(str(summary['model']))}</b>. Confident conflicts, with entropy below "
        f"{limits['entropy']:.4g} nats and probability below {limits['probability']:.4g} (the "
        f"{summary['percentile']:g}th percentiles), are <b>{conflict['share']:.2%}</b> of the tokens and "
        f"<b>{conflict['loss_share'] or 0:.2%}</b> of the loss.</p>"
    )


def _tables(summary: dict[str, Any]) -> str:
    quadrants = [
        [text, entry["tokens"], entry["share"], entry["loss_share"], entry["mean_probability"], entry["mean_entropy"]]
        for text, entry in zip(QUADRANTS.values(), summary["quadrants"].values(), strict=True)
    ]
    gates = [
        [name, entry["mean_weight"], entry["loss_kept"], *entry["kept"].values()]
        for name, entry in summary["gates"].items()
    ]
    fidelity = [[topk, entry["pearson"], entry["spearman"]] for topk, entry in summary["fidelity"].items()]
    keys = ("conflicts", "occurrences", "mean_probability", "mean_entropy")
    tokens = [[repr(entry["text"]), *(entry[key] for key in keys)] for entry in summary["conflict_tokens"]]
    examples = [
        [entry["row"], f"…{entry['before'][-160:]}", entry["token"], entry["after"][:60], entry["probability"],
         entry["entropy"]]
        for entry in summary["examples"]
    ]  # fmt: skip
    kept = [f"kept: {name.replace('_', ' ')}" for name in QUADRANTS]
    return "".join(
        [
            _table("Quadrants", ["", "tokens", "share", "share of loss", "mean p", "mean H"], quadrants),
            _table("What each gate leaves of the loss", ["gate", "mean w", "loss kept", *kept], gates),
            _table("Top-K against full entropy", ["K", "Pearson", "Spearman"], fidelity),
            _table("Tokens that conflict most often", ["token", "conflicts", "of", "mean p", "mean H"], tokens),
            _table("The heaviest conflicts", ["row", "before", "token", "after", "p", "H"], examples),
        ]
    )


def _table(title: str, head: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<details><summary>{html.escape(title)}</summary><table><tr>{cells}</tr>{lines}</table></details>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(value)
