"""The loss flags, the same for every entrypoint."""

from __future__ import annotations

import argparse

from eaft_megatron.hooks.settings import GATES, LossSettings


def add_eaft_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the loss flags in a group of their own. Values stay str, int or float: Megatron pickles its arguments."""
    group = parser.add_argument_group("eaft", "entropy-adaptive fine-tuning (arXiv 2601.02151) and its baselines")
    group.add_argument("--loss-type", choices=list(GATES), default="sft", help="what to train with (default: sft)")
    group.add_argument("--eaft-topk", type=int, default=20, metavar="K", help="logits in the entropy (default: 20)")
    group.add_argument(
        "--eaft-alpha", type=float, default=1.0, metavar="A", help="exponent of the linear gate, h ** A (default: 1)"
    )
    group.add_argument(
        "--eaft-entropy-norm",
        type=float,
        default=None,
        metavar="NATS",
        help="divisor of the entropy (default: ln K as in the paper; the authors' released code uses 3.0)",
    )
    group.add_argument(
        "--true-vocab-size",
        type=int,
        default=None,
        metavar="N",
        help="vocabulary without padding, config.vocab_size of the Hugging Face model (default: count padded columns)",
    )
    return parser


def settings_from_args(args: argparse.Namespace) -> LossSettings:
    """:class:`LossSettings` from parsed flags; ``ValueError`` names the flag that is wrong."""
    return LossSettings(
        loss_type=args.loss_type,
        topk=args.eaft_topk,
        alpha=args.eaft_alpha,
        entropy_norm=args.eaft_entropy_norm,
        true_vocab_size=args.true_vocab_size,
    )
