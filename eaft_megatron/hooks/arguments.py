"""The loss flags, the same for every entrypoint."""

from __future__ import annotations

import argparse

from eaft_megatron.hooks.settings import LossSettings, loss_options
from eaft_megatron.methods import Option


def add_eaft_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the loss flags in a group of their own. Values stay plain numbers and strings: Megatron pickles them."""
    group = parser.add_argument_group("eaft", "entropy-adaptive fine-tuning (arXiv 2601.02151) and its baselines")
    for option in loss_options():
        _add_option(group, option)
    parser.set_defaults(loss_type="sft")  # a script whose user asks for nothing trains as it always did
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
    saves = parser.add_argument_group("checkpoints", "beside the script's own flags")
    saves.add_argument(
        "--save-keep-last", type=int, default=None, metavar="N", help="keep the newest N checkpoints (default: all)"
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
    return LossSettings(**{option.name: getattr(args, option.destination) for option in loss_options()})


def loss_arguments() -> tuple[str, ...]:
    """The destinations of the loss flags in a parsed namespace: what makes two runs the same experiment."""
    return tuple(option.destination for option in loss_options() if not option.same_loss)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    if option.kind is bool:
        group.add_argument(option.flag, action="store_true", help=option.help)
    else:
        group.add_argument(
            option.flag,
            type=option.kind,
            default=option.default,
            choices=option.choices,
            metavar=option.metavar,
            help=option.help,
        )
