"""What ``prepare`` can be asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

from eaft_megatron.data.layouts import Columns
from eaft_megatron.data.prepared import check_multiple

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What decides the content of a prepared folder, beside the input and the tokenizer.

    Attributes:
        seq_length: positions of a sample; a row holds one token more at most.
        train_on: "all" assistant turns of a conversation, or the "last" one.
        end_token: appended, and trained on, where the template leaves a conversation's last answer without an end;
            most templates and what they write next do not.
        on_loss: what happens where the template leaves a text of a row out: "error", "keep" (train on what is left,
            and count it), or "drop-row".
        empty_thinking: what happens to a turn without thinking behind a prompt that opens it: "error", or "close" it.
        chat_template_kwargs: variables for the template, before a row's own; None: what suits each turn.
        overlong: what happens to a longer row: "truncate" (on the right), "drop", or "error".
        on_error: "stop" at the first bad row, or "skip" and count them.
        columns: names of the user's columns; None: recognise the layout.
        pack: put several rows into one sample.
        pad_to_multiple_of: each row in a pack is padded to this multiple: 2 x context-parallel size, and with sequence
            parallelism times the tensor-parallel size.
        valid_fraction, test_fraction: shares of the input rows that are set aside as DIR/valid and DIR/test.
        seed: decides which rows those are.
    """

    seq_length: int
    train_on: str = "all"
    end_token: str | None = None
    on_loss: str = "error"
    empty_thinking: str = "error"
    chat_template_kwargs: dict[str, Any] | None = None
    overlong: str = "truncate"
    on_error: str = "stop"
    columns: Columns = Columns()  # noqa: RUF009 - frozen
    pack: bool = True
    pad_to_multiple_of: int = 1
    valid_fraction: float = 0.0
    test_fraction: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        check_multiple(self.seq_length, self.pad_to_multiple_of)
        for flag, value, choices in (
            ("--train-on", self.train_on, ("all", "last")),
            ("--on-loss", self.on_loss, ("error", "keep", "drop-row")),
            ("--empty-thinking", self.empty_thinking, ("error", "close")),
            ("--overlong", self.overlong, ("truncate", "drop", "error")),
            ("--on-error", self.on_error, ("stop", "skip")),
        ):
            if value not in choices:
                raise ValueError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
        if min(self.valid_fraction, self.test_fraction) < 0 or self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction} must be >= 0 and "
                "leave something to train on"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The parts the output has; ("train",) alone means that the output folder itself is the part."""
        fractions = (1.0, self.valid_fraction, self.test_fraction)
        return tuple(name for name, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0)
