"""EAFT in slime, as its custom loss.

    PYTHONPATH=<this repository>/examples:$PYTHONPATH ... train_async.py <the flags of slime's SFT script> \\
        --loss-type custom_loss --custom-loss-function-path adapters.slime.eaft_loss --calculate-per-token-loss

Put `examples` on the path, never `examples/adapters`: there this file would hide the package slime itself. Ray's
workers need that path too (`env_vars` of slime's runtime environment). Options go into the YAML file that slime's
`--custom-config-path` names: `eaft_loss_type` (eaft, sft or dft, or talr with a fixed `talr_tau`), `eaft_gate`,
`eaft_topk`, `eaft_alpha`, `eaft_entropy_norm`, `eaft_threshold`, `talr_tau`, `talr_min_weight`, `true_vocab_size`.

Written against slime v0.3.1 (a6272da, 2026-08-06): ``loss_function`` in ``slime/backends/megatron_utils/loss.py``
calls this with logits of a packed (THD) micro-batch, not shifted, and a function that reduces per-token values.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eaft_megatron import Gate, TokenStats, vocab_parallel_token_loss
from eaft_megatron.hooks import LossSettings
from eaft_megatron.loss.gates import confident_conflicts

_IGNORE_INDEX = -100
_OPTIONS = {  # attribute of slime's arguments -> field of LossSettings
    "eaft_loss_type": "loss_type",
    "eaft_gate": "eaft_gate",
    "eaft_topk": "topk",
    "eaft_alpha": "alpha",
    "eaft_entropy_norm": "entropy_norm",
    "eaft_threshold": "threshold",
    "eaft_percentile": "percentile",
    "talr_tau": "talr_tau",
    "talr_min_weight": "talr_min_weight",
}


def eaft_loss(
    args: Namespace, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and what slime logs of it.

    Args:
        args: slime's arguments. Logits are divided by ``rollout_temperature``, as slime's own SFT loss does; columns
            from ``vocab_size`` (or ``true_vocab_size``) on are padding.
        batch: of one micro-batch, in order of its samples: ``unconcat_tokens`` (each ``[total]``, prompt and
            response, uncut), ``total_lengths``, ``response_lengths``, ``loss_masks`` (each ``[response]``).
        logits: ``[1, T, V/tp]``, position i predicting token i + 1; T is this context-parallel rank's share of the
            samples one after another, then padding.
        sum_of_sample_mean: sums response tokens ``[R]`` under their loss masks, each sample divided by its token
            count, or by nothing under ``--calculate-per-token-loss``. R counts this context-parallel rank's tokens.

    Returns:
        ``(loss, log)``: a scalar to differentiate and detached scalars, all reduced by ``sum_of_sample_mean``:
        "loss", "lm loss" (plain cross entropy), "eaft weight", "eaft entropy" (nats), "eaft conflict rate".

    Raises:
        ValueError: a layout or an option that this adapter does not serve; see the message.
    """
    settings = settings_from_slime(args)
    gate = _supported_gate(settings)
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise ValueError(f"logits must be packed, [1, T, V/tp], got {tuple(logits.shape)}")
    rows = logits.squeeze(0)
    temperature = getattr(args, "rollout_temperature", 1.0)
    if temperature != 1.0:
        rows = rows / temperature
    spans = _spans_on_this_rank(args, batch)
    loss, stats = vocab_parallel_token_loss(
        rows,
        shifted_targets(batch, spans, rows.shape[0], rows.device),
        gate,
        group=_tensor_parallel_group(),
        topk=settings.topk,
        vocab_size=settings.true_vocab_size,
        ignore_index=_IGNORE_INDEX,
        inplace_backward=True,  # nobody reads the logits after their loss
        return_stats=True,
    )

    def reduced(per_token: Tensor) -> Tensor:
        parts = [per_token[span.start : span.start + span.length] for span in spans]
        return sum_of_sample_mean(torch.cat(parts) if parts else per_token[:0])

    total = reduced(loss)
    return total, {"loss": total.detach().clone(), **{name: reduced(x) for name, x in _metrics(stats).items()}}


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive response tokens of one sample whose predictions this context-parallel rank holds.

    Attributes:
        sample: which sample of the micro-batch.
        start: row of the local logits that predicts the first of them.
        token: place of the first of them in the sample's tokens.
        length: how many; 0 for a piece without any, which slime's reduction expects nonetheless.
    """

    sample: int
    start: int
    token: int
    length: int


def response_spans(total_lengths: list[int], response_lengths: list[int], cp_rank: int, cp_size: int) -> list[Span]:
    """Where a packed micro-batch's response tokens are predicted, in the order in which slime reduces them.

    Without context parallelism a sample lies whole. With it, slime pads each sample to ``2 * cp`` equal chunks and
    rank r holds the chunks r and ``2 * cp - 1 - r``, one behind the other, so a response falls into two pieces.
    """
    spans, row = [], 0
    for sample, (total, response) in enumerate(zip(total_lengths, response_lengths, strict=True)):
        if not 0 <= response < total:
            raise ValueError(f"sample {sample} has {response} response tokens of {total}; the first needs a prompt")
        chunk = total if cp_size == 1 else -(-total // (2 * cp_size))
        held = (0,) if cp_size == 1 else (cp_rank, 2 * cp_size - 1 - cp_rank)
        for number in held:
            first = max(number * chunk, total - response - 1)  # the last prompt token predicts the response's first
            last = min((number + 1) * chunk, total - 1)  # the last token predicts nothing
            length = max(last - first, 0)
            start = row + first - number * chunk if length else row
            spans.append(Span(sample, start, first + 1, length))
            row += chunk
    return spans


def shifted_targets(batch: Mapping[str, Any], spans: list[Span], rows: int, device: torch.device) -> Tensor:
    """``[rows]`` int64: the token that each row of logits predicts; -100 for prompts, padding and masked tokens."""
    target = torch.full((rows,), _IGNORE_INDEX, dtype=torch.int64, device=device)
    for span in spans:
        tokens = batch["unconcat_tokens"][span.sample]
        prompt = batch["total_lengths"][span.sample] - batch["response_lengths"][span.sample]
        mask = batch["loss_masks"][span.sample][span.token - prompt : span.token - prompt + span.length]
        wanted = tokens[span.token : span.token + span.length]
        target[span.start : span.start + span.length] = wanted.masked_fill(mask == 0, _IGNORE_INDEX)
    return target


def settings_from_slime(args: Namespace) -> LossSettings:
    """The options as :class:`LossSettings`; ``ValueError`` for one that is wrong or unknown."""
    unknown = [name for name in vars(args) if name.startswith("eaft_") and name not in _OPTIONS]
    if unknown:
        raise ValueError(f"unknown option(s) {', '.join(sorted(unknown))}; known are {', '.join(_OPTIONS)}")
    given = {field: getattr(args, name) for name, field in _OPTIONS.items() if hasattr(args, name)}
    true_vocab_size = getattr(args, "true_vocab_size", None) or getattr(args, "vocab_size", None)
    return LossSettings(**{"loss_type": "eaft", **given, "true_vocab_size": true_vocab_size})


def _supported_gate(settings: LossSettings) -> Gate:
    gate = settings.gate()
    if gate.needs_batch:
        raise ValueError(
            "percentiles and TALR's median need the same number of tokens on every data-parallel rank, and slime "
            "packs as many as fit: give eaft_threshold or talr_tau instead"
        )
    if gate.needs_side:
        raise ValueError(f"eaft_loss_type {settings.loss_type} needs {gate.needs_side[0]}, which slime's batch lacks")
    return gate


def _spans_on_this_rank(args: Namespace, batch: Mapping[str, Any]) -> list[Span]:
    from megatron.core import mpu

    cp_size = mpu.get_context_parallel_world_size()
    if cp_size > 1 and getattr(args, "allgather_cp", False):
        raise ValueError("--allgather-cp cuts the packed stream elsewhere, which this adapter does not know")
    return response_spans(batch["total_lengths"], batch["response_lengths"], mpu.get_context_parallel_rank(), cp_size)


def _tensor_parallel_group():
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_group()


def _metrics(stats: TokenStats) -> dict[str, Tensor]:
    return {
        "lm loss": stats.ce,
        "eaft weight": stats.weight,
        "eaft entropy": stats.entropy,
        "eaft conflict rate": confident_conflicts(stats).float(),
    }
