"""The user's choice of loss, as plain numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from eaft_megatron.loss.gates import EAFTGate, Gate, SFTGate

GATES: dict[str, Callable[[LossSettings], Gate]] = {
    "sft": lambda settings: SFTGate(),
    "eaft": lambda settings: EAFTGate(alpha=settings.alpha, entropy_norm=settings.entropy_norm),
}


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Which loss to train with. Every field is a flag; see :func:`eaft_megatron.hooks.add_eaft_arguments`.

    Attributes:
        loss_type: a key of ``GATES``.
        topk: K of the entropy.
        alpha: exponent of the linear gate.
        entropy_norm: nats; None for ln K.
        true_vocab_size: vocabulary without the padding that tensor parallelism adds; None counts padded columns.
    """

    loss_type: str = "eaft"
    topk: int = 20
    alpha: float = 1.0
    entropy_norm: float | None = None
    true_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in GATES:
            raise ValueError(f"--loss-type must be one of {', '.join(GATES)}, got {self.loss_type!r}")
        if self.topk < 1:
            raise ValueError(f"--eaft-topk must be >= 1, got {self.topk}")
        if self.true_vocab_size is not None and self.true_vocab_size < 1:
            raise ValueError(f"--true-vocab-size must be >= 1, got {self.true_vocab_size}")
        self.gate().check(min(self.topk, self.true_vocab_size or self.topk))

    def gate(self) -> Gate:
        """The gate these settings describe."""
        return GATES[self.loss_type](self)
