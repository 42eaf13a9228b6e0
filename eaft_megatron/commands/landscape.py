"""``eaft-megatron landscape``: what the scores of a prepared folder show."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scored folder, where to write, and which tokens to look at."""
    parser.add_argument("folder", metavar="DIR", help="a prepared folder that `eaft-megatron score` has scored")
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="folder for landscape.png, gates.png, summary.json, index.html"
    )
    parser.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="default: the one the data was prepared with")
    parser.add_argument("--tokens", choices=["trained", "all"], default="trained", help="default: trained")
    parser.add_argument(
        "--percentile",
        type=float,
        default=15.0,
        metavar="P",
        help="below this one of entropy and of probability a token is a confident conflict (default: 15, the paper's)",
    )
    parser.add_argument("--samples", type=int, default=60, metavar="N", help="rows on the page (default: 60)")
    parser.add_argument("--top", type=int, default=50, metavar="N", help="lines of the tables of conflicts")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=20_000_000,
        metavar="N",
        help="where there are more, every n-th row alone is looked at (default: 20,000,000)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder and print the most important numbers."""
    from eaft_megatron.analysis.landscape_files import PAGE, write_landscape
    from eaft_megatron.data.encoding import load_tokenizer
    from eaft_megatron.data.prepared import PreparedData, training_folder

    for flag, value in (("--samples", args.samples), ("--top", args.top), ("--max-tokens", args.max_tokens - 1)):
        if value < 0:
            raise ValueError(f"{flag} is too small")
    data = PreparedData(training_folder(args.folder))
    summary = write_landscape(
        data,
        load_tokenizer(args.tokenizer or data.manifest["tokenizer"]["name"]),
        args.output,
        which=args.tokens,
        percentile=args.percentile,
        samples=args.samples,
        top=args.top,
        max_tokens=args.max_tokens,
    )
    print("\n".join(_lines(summary)))
    print(f"{args.output}/{PAGE} is written")
    return 0


def _lines(summary: dict[str, Any]) -> list[str]:
    conflict, limits = summary["quadrants"]["conflict"], summary["thresholds"]
    lines = [
        f"{summary['tokens']:,} tokens of {summary['rows']:,} rows, scored by {summary['model']} ({summary['dtype']})",
        f"confident conflicts (H < {limits['entropy']:.4g} nats and p < {limits['probability']:.4g}): "
        f"{conflict['share']:.2%} of tokens, {conflict['loss_share'] or 0:.2%} of the loss",
        "loss that is left: " + ", ".join(f"{n} {g['loss_kept'] or 0:.1%}" for n, g in summary["gates"].items()),
    ]
    for topk, found in summary["fidelity"].items():
        numbers = ("none" if found[name] is None else f"{found[name]:.4f}" for name in ("pearson", "spearman"))
        lines.append("top-{} against full entropy: Pearson {}, Spearman {}".format(topk, *numbers))
    return lines
