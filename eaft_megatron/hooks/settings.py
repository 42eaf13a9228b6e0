"""The user's choice of loss, as plain numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from eaft_megatron.loss import gates
from eaft_megatron.loss.gates import Gate

EAFT_GATES: dict[str, Callable[[LossSettings], Gate]] = {
    "linear": lambda settings: gates.EAFTGate(settings.entropy_norm, alpha=settings.alpha),
    "sigmoid": lambda settings: gates.SigmoidGate(settings.entropy_norm),
    "threshold": lambda settings: gates.ThresholdGate(
        settings.entropy_norm, threshold=settings.threshold, percentile=settings.percentile
    ),
    "conflict-mask": lambda settings: gates.ConflictMaskGate(
        settings.entropy_norm, **({} if settings.percentile is None else {"percentile": settings.percentile})
    ),
}
GATES: dict[str, Callable[[LossSettings], Gate]] = {
    "sft": lambda settings: gates.SFTGate(),
    "eaft": lambda settings: EAFT_GATES[settings.eaft_gate](settings),
    "dft": lambda settings: gates.DFTGate(),
    "talr": lambda settings: gates.TALRGate(settings.talr_tau, settings.talr_min_weight),
    "flow": lambda settings: gates.FLOWGate(),
    "sft-kl": lambda settings: gates.SFTKLGate(settings.sft_kl_beta),
}
"""``--loss-type`` -> gate. A new method is one line here."""

_USED_BY = {  # field: (flag, loss type it belongs to, gates it belongs to)
    "alpha": ("--eaft-alpha", "eaft", ("linear",)),
    "threshold": ("--eaft-threshold", "eaft", ("threshold",)),
    "percentile": ("--eaft-percentile", "eaft", ("threshold", "conflict-mask")),
    "entropy_norm": ("--eaft-entropy-norm", "eaft", tuple(EAFT_GATES)),
    "eaft_gate": ("--eaft-gate", "eaft", tuple(EAFT_GATES)),
    "talr_tau": ("--talr-tau", "talr", None),
    "talr_min_weight": ("--talr-min-weight", "talr", None),
    "sft_kl_beta": ("--sft-kl-beta", "sft-kl", None),
}


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Which loss to train with. Every field is a flag; see :func:`eaft_megatron.hooks.add_eaft_arguments`.

    Raises ``ValueError`` where a value is out of range, or a flag is given that the chosen loss would ignore.

    Attributes:
        loss_type: a key of ``GATES``.
        topk: K of the entropy.
        alpha: exponent of EAFT's linear gate.
        entropy_norm: nats; None for ln K.
        true_vocab_size: vocabulary without the padding that tensor parallelism adds; None counts padded columns.
        eaft_gate: a key of ``EAFT_GATES``.
        threshold, percentile: of the threshold gate (one of them); the percentile of the conflict mask too.
        talr_tau, talr_min_weight: of TALR; tau None for the median.
        sft_kl_beta: of SFT-KL.
        linear_chunk: tokens whose logits exist at a time, see ``vocab_parallel_linear_token_loss``; None: all of them.
        linear_drop_ignored: with it, leave ignored tokens out on a GPU too, at one host sync a micro-batch.
    """

    loss_type: str = "eaft"
    topk: int = 20
    alpha: float = 1.0
    entropy_norm: float | None = None
    true_vocab_size: int | None = None
    eaft_gate: str = "linear"
    threshold: float | None = None
    percentile: float | None = None
    talr_tau: float | None = None
    talr_min_weight: float = 0.01
    sft_kl_beta: float = 0.5
    linear_chunk: int | None = None
    linear_drop_ignored: bool = False

    def __post_init__(self) -> None:
        _choice("--loss-type", self.loss_type, GATES)
        _choice("--eaft-gate", self.eaft_gate, EAFT_GATES)
        if self.topk < 1:
            raise ValueError(f"--eaft-topk must be >= 1, got {self.topk}")
        if self.true_vocab_size is not None and self.true_vocab_size < 1:
            raise ValueError(f"--true-vocab-size must be >= 1, got {self.true_vocab_size}")
        if self.linear_chunk is not None and self.linear_chunk < 1:
            raise ValueError(f"--eaft-linear-chunk must be >= 1 (a few thousand tokens), got {self.linear_chunk}")
        if self.linear_drop_ignored and self.linear_chunk is None:
            raise ValueError("--eaft-linear-drop-ignored is for --eaft-linear-chunk N, which is missing")
        self._refuse_unused()
        self.gate().check(min(self.topk, self.true_vocab_size or self.topk))

    def gate(self) -> Gate:
        """The gate these settings describe."""
        return GATES[self.loss_type](self)

    def _refuse_unused(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in _USED_BY or getattr(self, field.name) == field.default:
                continue
            flag, loss_type, eaft_gates = _USED_BY[field.name]
            if self.loss_type != loss_type:
                raise ValueError(f"{flag} is for --loss-type {loss_type}, not {self.loss_type}: leave it out")
            if eaft_gates is not None and self.eaft_gate not in eaft_gates:
                raise ValueError(f"{flag} is for --eaft-gate {' or '.join(eaft_gates)}, not {self.eaft_gate}")


def _choice(flag: str, value: str, choices: dict) -> None:
    if value not in choices:
        raise ValueError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
