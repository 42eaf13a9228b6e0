"""Scoring with transformers, on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eaft_megatron.analysis.scoring import Batch
from eaft_megatron.analysis.token_scores import score_logits


class HFBackend:
    """A causal language model of transformers; any architecture it knows.

    Args:
        folder: a local Hugging Face folder.
        dtype: of the weights and of what is computed; the scores are float32.
        device: where.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.device = device

    @torch.no_grad()
    def run(
        self, parts: list[Batch], columns: dict[str, int | None], tick: Callable[[int], None]
    ) -> list[dict[str, Tensor]]:
        """The columns of each batch, on the CPU."""
        scores = []
        for part in parts:
            tokens, target = part.tokens.to(self.device), part.target.to(self.device)
            # No attention mask: the padding stands on the right, and only its own, ignored positions look at it.
            logits = self.model(input_ids=tokens, use_cache=False).logits
            found = score_logits(logits, target, columns, vocab_size=logits.shape[-1])
            scores.append({name: values.cpu() for name, values in found.items()})
            tick(int((part.target >= 0).sum()))
        return scores
