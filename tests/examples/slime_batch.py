"""A slime micro-batch (v0.3.1): its samples, how ranks hold them, how slime reduces them, and the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eaft_megatron.hooks.metrics import METRICS
from eaft_megatron.loss.reference import reference_eaft_loss

VOCAB = 90  # of the 96 columns that the logits have
COLUMNS = 96
TOTALS, RESPONSES = [11, 5, 9, 14], [4, 3, 8, 6]


def samples() -> dict:
    """What slime's batch holds of four samples: uncut tokens, lengths, and the loss masks of the responses."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(VOCAB, (total,), generator=generator) for total in TOTALS]
    masks = [(torch.rand(length, generator=generator) < 0.7).int() for length in RESPONSES]
    return {"unconcat_tokens": tokens, "total_lengths": TOTALS, "response_lengths": RESPONSES, "loss_masks": masks}


def sample_logits() -> list[Tensor]:
    """Each sample's logits ``[total, COLUMNS]`` float32, peaked here and there as a trained model's are."""
    generator = torch.Generator().manual_seed(6)
    scale = [1.0, 8.0, 3.0, 5.0]
    return [torch.randn(t, COLUMNS, generator=generator) * s for t, s in zip(TOTALS, scale, strict=True)]


def pieces(values: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """A context-parallel rank's two chunks of a sample, zeros where the sample is padded."""
    if cp_size == 1:
        return values
    chunk = -(-len(values) // (2 * cp_size))
    padded = torch.cat([values, values.new_zeros(2 * cp_size * chunk - len(values), *values.shape[1:])])
    chunks = padded.split(chunk)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def reduction(batch: dict, cp_rank: int, cp_size: int, per_token: bool) -> Callable[[Tensor], Tensor]:
    """Slime's reduction: the mask of the response, aligned with the rows that predict it and cut as they are."""
    kept, held = [], []
    for total, response, mask in zip(TOTALS, RESPONSES, batch["loss_masks"], strict=True):
        aligned = torch.zeros(total, dtype=torch.int64)
        aligned[total - response - 1 : total - 1] = 1 + mask  # 1: masked, 2: counts
        local = pieces(aligned, cp_rank, cp_size)
        local = local[local > 0]
        kept.append((local == 2).float())
        held.append(len(local))
    denominators = [1 if per_token else mask.sum().clamp(min=1) for mask in batch["loss_masks"]]

    def reduce(values: Tensor) -> Tensor:
        parts = values.split(held)
        return sum((x * k).sum() / d for x, k, d in zip(parts, kept, denominators, strict=True))

    return reduce


def reference(per_token: bool, temperature: float) -> tuple[dict[str, float], list[Tensor]]:
    """The log of the whole micro-batch, and d loss / d logits of each sample, float64, sample by sample."""
    batch, log, gradients = samples(), dict.fromkeys(["loss", *METRICS], 0.0), []
    for tokens, logits, response, mask in zip(
        batch["unconcat_tokens"], sample_logits(), RESPONSES, batch["loss_masks"], strict=True
    ):
        leaf = logits.double().requires_grad_()
        target = tokens[-response:].masked_fill(mask == 0, -100)
        loss, ce, entropy, weight = reference_eaft_loss(
            leaf[-response - 1 : -1] / temperature, target, vocab_size=VOCAB
        )
        divisor = 1 if per_token else mask.sum().clamp(min=1)
        (loss.sum() / divisor).backward()
        gradients.append(leaf.grad)
        conflict = (entropy / math.log(20) < 0.17) & ((-ce).exp() < 0.1) & (target != -100)
        for name, values in zip(METRICS, (ce, loss, weight, entropy, conflict), strict=True):
            log[name] += total_of(values) / float(divisor)
    log["loss"] = log.pop("eaft loss")
    return log, gradients


def total_of(values: Tensor) -> float:
    """Their sum in float64."""
    return float(values.detach().double().sum())
