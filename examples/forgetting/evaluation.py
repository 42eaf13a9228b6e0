"""Held-out loss and accuracy of a Hugging Face folder, by transformers' own model: not the code that trained it."""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from eaft_megatron.analysis.batching import batches
from eaft_megatron.analysis.scoring import make_batch
from eaft_megatron.data.prepared import PreparedData

BATCH_TOKENS = 2048


@torch.inference_mode()
def evaluate(model: Path, sets: dict[str, Path], *, dtype: str, device: str) -> dict[str, dict[str, float]]:
    """Metrics of each prepared folder in `sets`, over the tokens that its mask counts.

    - loss: mean cross entropy, nats per token.
    - accuracy: share of tokens that are the model's first choice, everything before them given.
    - exact: share of rows of which every counted token is. For a chat with one answer that is the share of answers
      which greedy decoding gives back word for word.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval().to(device)
    return {name: _evaluate_set(network, PreparedData(folder), device) for name, folder in sets.items()}


def _evaluate_set(network: torch.nn.Module, data: PreparedData, device: str) -> dict[str, float]:
    loss, right, tokens, exact, rows = 0.0, 0, 0, 0, 0
    for indices in batches(data.lengths, 0, len(data), BATCH_TOKENS):
        batch = make_batch(data, indices)
        counted = torch.zeros_like(batch.target, dtype=torch.bool)
        for i, row in enumerate(indices):
            mask = torch.from_numpy(data.tokens(row)[1].copy())
            counted[i, : len(mask) - 1] = mask[1:]
        hidden = network.base_model(batch.tokens.to(device), use_cache=False)[0]
        target = batch.target[counted].to(device)
        logits = network.get_output_embeddings()(hidden[counted.to(device)]).float()
        loss += float(F.cross_entropy(logits, target, reduction="sum").double())
        correct = torch.ones_like(counted)
        correct[counted] = (logits.argmax(-1) == target).cpu()
        right += int(correct[counted].sum())
        tokens += int(counted.sum())
        exact += int(correct.all(-1).sum())
        rows += len(indices)
    return {"loss": loss / tokens, "accuracy": right / tokens, "exact": exact / rows, "tokens": tokens, "rows": rows}
