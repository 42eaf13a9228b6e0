"""The user's choice of loss, as plain numbers and words."""

from __future__ import annotations

import dataclasses
from typing import Any

from eaft_megatron.loss.gate import Gate
from eaft_megatron.methods import EAFT_GATES, METHODS, Method, Option, method_options, rows


def _field(default: Any, flag: str, text: str, **of_option: Any) -> Any:
    """A field that every method has; its flag and help travel in the metadata."""
    return dataclasses.field(default=default, metadata={"flag": flag, "help": text, **of_option})


@dataclasses.dataclass(frozen=True, init=False)
class LossSettings:
    """Which loss to train with. Every field is a flag; see :func:`eaft_megatron.hooks.add_eaft_arguments`.

    Beside the fields below it takes, and has as attributes, the options of the methods: ``alpha``, ``entropy_norm``,
    ``threshold``, ``percentile`` (EAFT's gates), ``talr_tau``, ``talr_min_weight``, ``sft_kl_beta``, and whatever else
    the table in :mod:`eaft_megatron.methods` has: ``LossSettings("talr", talr_tau=2.0)``.

    Raises ``ValueError`` where a value is out of range, or an option is given that the chosen loss would ignore, and
    ``TypeError`` for a name that is no option.

    Attributes:
        loss_type: a key of ``METHODS``.
        eaft_gate: a key of ``EAFT_GATES``.
        topk: K of the entropy.
        true_vocab_size: vocabulary without the padding that tensor parallelism adds; None counts padded columns.
        linear_chunk: tokens whose logits exist at a time, see ``vocab_parallel_linear_token_loss``; None: all of them.
        linear_drop_ignored: with it, leave ignored tokens out on a GPU too, at one host sync a micro-batch.
        options: (name, value) of the methods' options that are not at their default, in the order of the table.
    """

    loss_type: str = _field("eaft", "--loss-type", "what to train with (default: sft)", kind=str, key="type")
    eaft_gate: str = _field("linear", "--eaft-gate", "entropy to weight (linear)", kind=str, key="gate")
    topk: int = _field(20, "--eaft-topk", "logits in the entropy (default: 20)", kind=int, metavar="K")
    true_vocab_size: int | None = _field(
        None,
        "--true-vocab-size",
        "vocabulary without padding, config.vocab_size (default: count padded columns)",
        kind=int,
        metavar="N",
        key="",
    )
    linear_chunk: int | None = _field(
        None,
        "--eaft-linear-chunk",
        "output layer and loss in one, N tokens at a time: logits are never whole",
        kind=int,
        metavar="N",
        same_loss=True,
    )
    linear_drop_ignored: bool = _field(
        False,
        "--eaft-linear-drop-ignored",
        "with it, leave ignored tokens out of the output layer on a GPU too: one host sync a micro-batch",
        kind=bool,
        same_loss=True,
    )
    options: tuple[tuple[str, float], ...] = ()

    def __init__(self, loss_type: str = "eaft", topk: int = 20, **given: Any) -> None:
        given = {"loss_type": loss_type, "topk": topk, **dict(given.pop("options", ())), **given}
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given.pop(field.name, field.default))
        known = {option.name: option for option in method_options()}
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(f"LossSettings has no {unknown[0]}; options of the methods are {', '.join(known)}")
        chosen = tuple(
            (name, given[name]) for name, option in known.items() if given.get(name, option.default) != option.default
        )
        object.__setattr__(self, "options", chosen)
        self._check()

    def __getattr__(self, name: str) -> Any:
        """A method's option."""
        if not name.startswith("_") and name != "options":
            for option in method_options():
                if option.name == name:
                    return dict(self.options).get(name, option.default)
        raise AttributeError(f"LossSettings has no {name}")

    @property
    def method(self) -> Method:
        """The row of the table."""
        entry = METHODS[self.loss_type]
        return entry if isinstance(entry, Method) else entry[self.eaft_gate]

    def gate(self) -> Gate:
        """The gate these settings describe."""
        return self.method.build({option.name: getattr(self, option.name) for option in self.method.options})

    def _check(self) -> None:
        _check_choice("--loss-type", self.loss_type, METHODS)
        _check_choice("--eaft-gate", self.eaft_gate, EAFT_GATES)
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

    def _refuse_unused(self) -> None:
        if self.eaft_gate != "linear" and self.loss_type != "eaft":
            raise ValueError(f"--eaft-gate is for --loss-type eaft, not {self.loss_type}: remove it")
        for option in method_options():
            if option.name not in dict(self.options):
                continue
            owners = [(loss_type, gate) for loss_type, gate, method in rows() if option in method.options]
            if not any(loss_type == self.loss_type for loss_type, _ in owners):
                types = " or ".join(dict.fromkeys(loss_type for loss_type, _ in owners))
                raise ValueError(f"{option.flag} is for --loss-type {types}, not {self.loss_type}: remove it")
            if option not in self.method.options:
                gates = " or ".join(gate for loss_type, gate in owners if gate and loss_type == self.loss_type)
                raise ValueError(f"{option.flag} is for --eaft-gate {gates}, not {self.eaft_gate}: remove it")


def loss_options() -> list[Option]:
    """Every option of the loss: those of all methods together, then what each method has of its own."""
    choices = {"loss_type": tuple(METHODS), "eaft_gate": tuple(EAFT_GATES)}
    common = [
        Option(field.name, default=field.default, choices=choices.get(field.name), **field.metadata)
        for field in dataclasses.fields(LossSettings)
        if field.metadata
    ]
    return [*common, *method_options()]


def _check_choice(flag: str, value: str, choices: dict) -> None:
    if value not in choices:
        raise ValueError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
