"""The conflicting tokens in words: which they are, and where they stand."""

from __future__ import annotations

from typing import Any

import numpy as np

from eaft_megatron.analysis.tokens import ScoredTokens
from eaft_megatron.data.prepared import PreparedData

_BEFORE, _AFTER = 48, 16  # tokens of context
_PER_ROW = 2  # examples out of one row


def conflict_table(tokens: ScoredTokens, conflict: np.ndarray, tokenizer: Any, top: int = 50) -> list[dict[str, Any]]:
    """The tokens that conflict most often, means over their conflicting occurrences; ``conflict`` is ``[n]`` bool."""
    ids, inverse, counts = np.unique(tokens.ids[conflict], return_inverse=True, return_counts=True)
    sums = [
        np.bincount(inverse, values[conflict].astype(np.float64), len(ids))
        for values in (-tokens.logprob, tokens.probability, tokens.entropy)
    ]
    everywhere = np.bincount(tokens.ids, minlength=int(tokens.ids.max()) + 1)
    table = []
    for i in np.lexsort((-sums[0], -counts))[:top]:
        loss, probability, entropy = (float(column[i] / counts[i]) for column in sums)
        table.append(
            {
                "token_id": int(ids[i]),
                "text": tokenizer.decode([int(ids[i])], clean_up_tokenization_spaces=False),
                "conflicts": int(counts[i]),
                "occurrences": int(everywhere[ids[i]]),
                "mean_probability": probability,
                "mean_entropy": entropy,
                "mean_loss": loss,
            }
        )
    return table


def conflict_examples(
    data: PreparedData, tokens: ScoredTokens, conflict: np.ndarray, tokenizer: Any, top: int = 50
) -> list[dict[str, Any]]:
    """The conflicting tokens of the largest loss, with what stands before and after; two of a row at most."""
    candidates = np.flatnonzero(conflict)
    candidates = candidates[np.argsort(tokens.logprob[candidates], kind="stable")]
    taken: dict[int, int] = {}
    examples: list[dict[str, Any]] = []
    for index in candidates:
        row, position = int(tokens.row[index]), int(tokens.position[index])
        if len(examples) == top:
            break
        if taken.get(row, 0) == _PER_ROW:
            continue
        taken[row] = taken.get(row, 0) + 1
        begin, end = max(position - _BEFORE, 0), position + 1 + _AFTER
        texts = token_texts(tokenizer, data.tokens(row)[0][begin:end].tolist())
        examples.append(
            {
                "row": row,
                "position": position,
                "source": data[row].source,
                "before": "".join(texts[: position - begin]),
                "token": texts[position - begin],
                "after": "".join(texts[position - begin + 1 :]),
                "probability": float(np.exp(tokens.logprob[index])),
                "entropy": float(tokens.entropy[index]),
            }
        )
    return examples


def sample_rows(tokens: ScoredTokens, conflict: np.ndarray, count: int) -> list[int]:
    """Rows to show: up to half of ``count`` with the most conflicts, the others spread evenly over the data."""
    rows, inverse = np.unique(tokens.row, return_inverse=True)
    conflicts = np.bincount(inverse, conflict, len(rows))
    order = np.argsort(-conflicts, kind="stable")
    chosen = [int(rows[i]) for i in order[: count // 2] if conflicts[i]]
    rest = np.setdiff1d(rows, chosen)
    wanted = min(count - len(chosen), len(rest))
    return chosen + rest[np.linspace(0, len(rest) - 1, wanted).astype(int)].tolist()


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; joined they are the text.

    A character that several tokens make up is the last one's, and the others add nothing. Each token is decoded
    together with those before it, for some tokenizers drop the space before a text's first word.
    """

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    begin = middle = 0  # ids[begin:middle] is context, what follows has not been put out yet
    for end in range(1, len(ids) + 1):
        known, text = decode(ids[begin:middle]), decode(ids[begin:end])
        if text.endswith("\ufffd") and end < len(ids) and end - middle < 6:
            texts.append("")
            continue
        texts.append(text[len(known) :])
        begin, middle = middle, end
    return texts
