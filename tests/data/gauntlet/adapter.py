"""The encoder under test; the only place that imports it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from eaft_megatron.data.chat import encode_row
from eaft_megatron.data.layouts import canonical_row

# Flags that a refusal may name as a way out -> the encoder's argument.
OPTIONS = {
    "--train-on": "train_on",
    "--end-token": "end_token",
    "--on-loss": "on_loss",
    "--empty-thinking": "empty_thinking",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a row: samples of (ids, mask), or why it was refused or how it crashed.

    `losses`: what the encoder says it could not keep.
    """

    samples: list[tuple[list[int], list[bool]]] = field(default_factory=list)
    losses: tuple[str, ...] = ()
    refusal: str | None = None
    crash: str | None = None


def encode(tokenizer: Any, row: dict[str, Any], **options: Any) -> Outcome:
    try:
        encoded = encode_row(tokenizer, canonical_row(row), **options)
    except ValueError as error:
        return Outcome(refusal=str(error))
    except Exception as error:  # anything else is a bug of the encoder: the judge counts it as wrong
        return Outcome(crash=f"{type(error).__name__}: {error}")
    samples = [(list(sample.input_ids), list(map(bool, sample.labels_mask))) for sample in encoded.samples]
    return Outcome(samples, tuple(getattr(encoded, "losses", ())))


def way_out(refusal: str) -> dict[str, Any] | None:
    """The arguments that a refusal tells the user to give, where it names flags with values that `encode` takes."""
    named = re.findall(r"(--[a-z-]+) ([^\s,;:()]+)", refusal)
    options = {OPTIONS[flag]: value.strip("'\"") for flag, value in named if flag in OPTIONS}
    return options or None
