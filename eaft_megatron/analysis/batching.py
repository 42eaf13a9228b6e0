"""Which rows are scored together."""

from __future__ import annotations

import numpy as np

WINDOW_TOKENS = 1 << 17
"""Rows are taken in windows of about so many tokens: what is in memory at a time, and what a killed run may lose."""


def windows(lengths: np.ndarray, window_tokens: int = WINDOW_TOKENS) -> list[tuple[int, int]]:
    """Consecutive rows ``[begin, end)`` of at most ``window_tokens`` tokens together, at least one row each.

    They depend on the data alone, so that a run continued with other flags finds the same ones.
    """
    ends = np.cumsum(lengths)
    found, begin = [], 0
    while begin < len(lengths):
        before = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, before + window_tokens, side="right")), begin + 1)
        found.append((begin, end))
        begin = end
    return found


def batches(lengths: np.ndarray, begin: int, end: int, batch_tokens: int) -> list[list[int]]:
    """Rows ``begin`` to ``end`` in batches of similar length, the longest first.

    A batch, padded to its longest row, has at most ``batch_tokens`` positions, or it is a single row. A row of one
    token has nothing to predict and is in none.
    """
    order = begin + np.argsort(-lengths[begin:end], kind="stable")
    batches: list[list[int]] = []
    for row in order[lengths[order] > 1].tolist():
        if batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] - 1) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
