"""The scored tokens of a prepared folder, flat."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from eaft_megatron.analysis.scoring import same_model
from eaft_megatron.analysis.token_scores import ENTROPY, LOGPROB, TOPK_ENTROPY
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
    records = data.columns()
    for name in (LOGPROB, TOPK_ENTROPY):
        if name not in records:
            raise ValueError(f"{data.path} has no column {name}: `eaft-megatron score MODEL {data.path}` makes it")
    record = records[TOPK_ENTROPY]
    entropies: dict[str, int | None] = {
        name: found.get("topk") for name, found in records.items() if name == ENTROPY or name.startswith(TOPK_ENTROPY)
    }
    for name in (LOGPROB, *entropies):
        if not same_model(records[name], record):
            raise ValueError(
                f"{data.path}: columns {name} and {TOPK_ENTROPY} are not of one model: `eaft-megatron score "
                f"--overwrite` makes them anew"
            )
    counts = data.manifest["counts"]
    total = counts["trained_tokens"] if which == "trained" else counts["tokens"]
    rows = range(0, len(data), max(-(-total // max_tokens), 1))
    names = [LOGPROB, *entropies]
    parts: list[list[np.ndarray]] = [[] for _ in range(3 + len(names))]
    for row in rows:
        ids, mask = data.tokens(row)
        keep = np.array(mask) if which == "trained" else np.ones(len(ids), bool)
        keep[:1] = False
        positions = np.flatnonzero(keep)
        found = [data.column(name, row)[positions] for name in names]
        values = [ids[positions], np.full(len(positions), row, np.int64), positions.astype(np.int32), *found]
        for part, value in zip(parts, values, strict=True):
            part.append(value)
    ids, row, position, logprob, *rest = (np.concatenate(part) for part in parts)
    if not len(ids):
        raise ValueError(f"{data.path} has no token to look at")
    by_name = dict(zip(entropies, rest, strict=True))
    others = {entropies[name]: values for name, values in by_name.items()}
    return ScoredTokens(ids, row, position, logprob, by_name[TOPK_ENTROPY], record["topk"], others, record, len(rows))
