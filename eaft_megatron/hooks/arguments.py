"""The loss flags, the same for every entrypoint."""

from __future__ import annotations

import argparse

from eaft_megatron.hooks.settings import EAFT_GATES, GATES, LossSettings

_FIELDS = {  # LossSettings field -> argparse destination
    "loss_type": "loss_type",
    "topk": "eaft_topk",
    "alpha": "eaft_alpha",
    "entropy_norm": "eaft_entropy_norm",
    "true_vocab_size": "true_vocab_size",
    "eaft_gate": "eaft_gate",
    "threshold": "eaft_threshold",
    "percentile": "eaft_percentile",
    "talr_tau": "talr_tau",
    "talr_min_weight": "talr_min_weight",
    "sft_kl_beta": "sft_kl_beta",
}
_MEANS = {"linear_chunk": "eaft_linear_chunk", "linear_drop_ignored": "eaft_linear_drop_ignored"}  # same loss, cheaper


def add_eaft_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the loss flags in a group of their own. Values stay plain numbers and strings: Megatron pickles them."""
    group = parser.add_argument_group("eaft", "entropy-adaptive fine-tuning (arXiv 2601.02151) and its baselines")

    def add(flag: str, kind: type, metavar: str, text: str, default: float | None = None) -> None:
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)

    group.add_argument("--loss-type", choices=list(GATES), default="sft", help="what to train with (default: sft)")
    group.add_argument("--eaft-gate", choices=list(EAFT_GATES), default="linear", help="entropy to weight (linear)")
    add("--eaft-topk", int, "K", "logits in the entropy (default: 20)", 20)
    add("--eaft-alpha", float, "A", "linear gate: h ** A; the paper also tries 2 and 3 (default: 1)", 1.0)
    add("--eaft-entropy-norm", float, "NATS", "divisor of the entropy (default: ln K; the authors' code uses 3.0)")
    add("--eaft-threshold", float, "H", "threshold gate: train where h > H")
    add(
        "--eaft-percentile", float, "PCT", "threshold gate and conflict mask: percentile of the micro-batch (paper: 15)"
    )
    add("--talr-tau", float, "T", "TALR: temperature (default: median of the sequences' mean loss)")
    add("--talr-min-weight", float, "W", "TALR: floor of the weight (default: 0.01)", 0.01)
    add("--sft-kl-beta", float, "B", "SFT-KL: weight of the KL term (default: 0.5)", 0.5)
    add("--true-vocab-size", int, "N", "vocabulary without padding, config.vocab_size (default: count padded columns)")
    add("--eaft-linear-chunk", int, "N", "output layer and loss in one, N tokens at a time: logits are never whole")
    group.add_argument(
        "--eaft-linear-drop-ignored",
        action="store_true",
        help="with it, leave ignored tokens out of the output layer on a GPU too: one host sync a micro-batch",
    )
    data = parser.add_argument_group("prepared data", "folders that `eaft-megatron prepare` makes")
    data.add_argument("--sft-data", default=None, metavar="DIR", help="train on this prepared folder")
    data.add_argument(
        "--sft-eval-data",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="evaluate on this prepared folder, under this name; may be repeated",
    )
    data.add_argument(
        "--sft-packing",
        choices=["auto", "thd", "mask", "none"],
        default="auto",
        help="thd: packed sequences with --sft and Transformer Engine; mask: an attention mask, for the local "
        "implementation; none: one row a sample (default: auto, and never attention across rows)",
    )
    return parser


def named_paths(values: list[str], flag: str, metavar: str = "NAME=DIR") -> dict[str, str]:
    """NAME=DIR, ... as a dict; ``ValueError`` names ``flag``."""
    sets: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise ValueError(f"{flag} takes {metavar}, got {value!r}")
        if name in sets:
            raise ValueError(f"{flag} names {name!r} twice")
        sets[name] = path
    return sets


def settings_from_args(args: argparse.Namespace) -> LossSettings:
    """:class:`LossSettings` from parsed flags; ``ValueError`` names the flag that is wrong."""
    return LossSettings(**{field: getattr(args, name) for field, name in (_FIELDS | _MEANS).items()})


def loss_arguments() -> tuple[str, ...]:
    """The destinations of the loss flags in a parsed namespace: what makes two runs the same experiment."""
    return tuple(_FIELDS.values())
