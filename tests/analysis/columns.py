"""Columns of scores: made up for a prepared folder, and what transformers' own logits give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from eaft_megatron.data.prepared import PreparedData, write_column

RECORD = {"model": {"name": "made/up", "config_sha256": "c", "weights_fingerprint": "w"}, "dtype": "float32"}


def write_scores(folder: Path, seed: int = 0) -> PreparedData:
    """Columns drawn at random: entropies of K = 5, 20 and all, and probabilities that go with them."""
    data, generator = PreparedData(folder), np.random.default_rng(seed)
    entropy = [generator.exponential(0.8, n).clip(0, 2.9).astype(np.float32) for n in data.lengths]
    columns = {
        "topk_entropy": (entropy, {"topk": 20}),
        "topk_entropy_5": ([h * 0.5 for h in entropy], {"topk": 5}),
        "entropy": ([h + generator.exponential(0.1, len(h)) for h in entropy], {}),
        "ref_logprob": ([-generator.exponential(0.2 + h) for h in entropy], {}),
    }
    for name, (rows, extra) in columns.items():
        write_column(data, name, (np.concatenate([[0], row[1:]]) for row in rows), {**RECORD, **extra})
    return PreparedData(folder)


def truth(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of one row from transformers' logits, alone in its batch, and log_softmax in float64."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].double()
    logp = logits.log_softmax(-1)
    columns = {"ref_logprob": logp.gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]}
    columns["sum_p_squared"] = logp.exp().square().sum(-1)
    columns["entropy"] = -(logp.exp() * logp).sum(-1)
    for k in (5, 10, 20, 50):
        q = logits.topk(k).values.log_softmax(-1)
        columns["topk_entropy" if k == 20 else f"topk_entropy_{k}"] = -(q.exp() * q).sum(-1)
    return {name: np.concatenate([[0.0], values.numpy()]) for name, values in columns.items()}
