"""The scored tokens of a prepared folder, flat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from eaft_megatron.analysis.scoring import same_model
from eaft_megatron.analysis.token_scores import ENTROPY, LOGPROB, SUM_P_SQUARED, TOPK_ENTROPY
from eaft_megatron.data.prepared import PreparedData


@dataclasses.dataclass(frozen=True)
class ScoredTokens:
    """n tokens that something predicts; the arrays are all ``[n]``.

    Attributes:
        ids: int32, the token.
        row, position: int64, int32: where it stands.
        logprob: float32, the model's log-probability of it, in nats.
        entropy: float32, top-K entropy of the distribution that predicts it, in nats.
        topk: K.
        others: further entropies, ``[n]`` float32: {None: full entropy, 5: top-5, ...}.
        record: the manifest of the column ``topk_entropy``.
        rows: how many rows were read; fewer than the folder has where ``max_tokens`` was reached.
        sum_p_squared: float32, sum of the squared probabilities of the prediction; None where it was not scored.
    """

    ids: np.ndarray
    row: np.ndarray
    position: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray
    topk: int
    others: dict[int | None, np.ndarray]
    record: dict[str, Any]
    rows: int
    sum_p_squared: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def probability(self) -> np.ndarray:
        """``[n]`` float32."""
        return np.exp(self.logprob)


def read_tokens(data: PreparedData, *, which: str = "trained", max_tokens: int = 20_000_000) -> ScoredTokens:
    """The tokens that are trained on, or ("all") every token but the first of each row.

    Where they would be more than about ``max_tokens``, every n-th row alone is read.

    Raises:
        ValueError: no scores, scores of two models, or no tokens.
    """
    counts = data.manifest["counts"]
    total = counts["trained_tokens"] if which == "trained" else counts["tokens"]
    return read_rows(data, range(0, len(data), max(-(-total // max_tokens), 1)), which=which)


def read_rows(
    data: PreparedData, rows: Sequence[int], *, which: str = "trained", longest: int | None = None
) -> ScoredTokens:
    """These rows' tokens, as :func:`read_tokens` has them; of each row those among its first ``longest`` tokens."""
    entropies, names = _score_columns(data)
    ids_of, row_of, position_of = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    scores: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] for name in names}
    for row in rows:
        ids, mask = data.tokens(row)
        keep = np.array(mask[:longest]) if which == "trained" else np.ones(len(ids[:longest]), bool)
        keep[:1] = False
        positions = np.flatnonzero(keep)
        ids_of.append(ids[positions])
        row_of.append(np.full(len(positions), row, np.int64))
        position_of.append(positions.astype(np.int32))
        for name, parts in scores.items():
            parts.append(data.column(name, row)[positions])
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    if not len(joined[LOGPROB]):
        raise ValueError(f"{data.path} has no token to look at")
    record = data.columns()[TOPK_ENTROPY]
    return ScoredTokens(
        np.concatenate(ids_of),
        np.concatenate(row_of),
        np.concatenate(position_of),
        joined[LOGPROB],
        joined[TOPK_ENTROPY],
        record["topk"],
        {topk: joined[name] for name, topk in entropies.items()},
        record,
        len(rows),
        joined.get(SUM_P_SQUARED),
    )


def _score_columns(data: PreparedData) -> tuple[dict[str, int | None], list[str]]:
    """(name -> K of the entropies, every column to read); ``ValueError`` where they are missing or of two models."""
    records = data.columns()
    for name in (LOGPROB, TOPK_ENTROPY):
        if name not in records:
            raise ValueError(f"{data.path} has no column {name}: `eaft-megatron score MODEL {data.path}` makes it")
    entropies: dict[str, int | None] = {
        name: found.get("topk") for name, found in records.items() if name == ENTROPY or name.startswith(TOPK_ENTROPY)
    }
    names = [LOGPROB, *entropies, *([SUM_P_SQUARED] if SUM_P_SQUARED in records else [])]
    for name in names:
        if not same_model(records[name], records[TOPK_ENTROPY]):
            raise ValueError(
                f"{data.path}: columns {name} and {TOPK_ENTROPY} are not of one model: `eaft-megatron score "
                f"--overwrite` makes them anew"
            )
    return entropies, names
