"""``eaft-megatron inspect``: look at a prepared folder."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and what to show of it."""
    parser.add_argument("folder", metavar="DIR", help="what `eaft-megatron prepare` made")
    parser.add_argument("--sample", type=int, metavar="N", help="print pack N (without packing: row N)")
    parser.add_argument("--row", type=int, metavar="N", help="print row N")
    parser.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="default: the one the data was prepared with")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="default: on a terminal")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the histograms")


def run(args: argparse.Namespace) -> int:
    """Print the summary, or one sample."""
    from eaft_megatron.data.inspect import draw, sample_text, summary
    from eaft_megatron.data.prepare import load_tokenizer
    from eaft_megatron.data.prepared import PreparedData, training_folder

    data = PreparedData(training_folder(args.folder))
    if args.sample is None and args.row is None:
        print("\n".join(summary(data)))
    else:
        tokenizer = load_tokenizer(args.tokenizer or data.manifest["tokenizer"]["name"])
        data.check_tokenizer(tokenizer)
        print(sample_text(data, tokenizer, sample=args.sample, row=args.row, color=args.color))
    if args.plot:
        draw(data, args.plot)
        print(f"{args.plot} is written")
    return 0
