"""``eaft-megatron prepare``: conversations into tokenized, masked, packed samples."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes in, what comes out, and how it is cut."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input",
        nargs="+",
        metavar="SOURCE",
        help="JSONL, JSON or Parquet files, folders or globs of them, or a dataset of the Hugging Face hub",
    )
    data.add_argument("--dataset-split", metavar="NAME", help="split of a `datasets` source with several")
    data.add_argument("--dataset-config", metavar="NAME", help="configuration of a `datasets` source")
    data.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="the model's own: its chat template is what renders")
    data.add_argument("--output", metavar="DIR", help="the folder to make")
    data.add_argument("--overwrite", action="store_true", help="replace a folder that holds something else")
    columns = parser.add_argument_group("columns", "OpenAI, ShareGPT, Alpaca and prompt/response rows are recognised")
    for name in ("messages", "tools", "system", "prompt", "response", "text"):
        columns.add_argument(f"--{name}-column", metavar="NAME")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--seq-length", type=int, metavar="S", required=True, help="positions of a sample")
    samples.add_argument("--train-on", choices=["all", "last"], default="all", help="assistant turns (default: all)")
    samples.add_argument(
        "--end-token",
        metavar="TOKEN",
        help="ends answers behind which neither the template nor what it writes next has an end-of-turn token",
    )
    samples.add_argument("--chat-template", metavar="FILE", help="a template instead of the tokenizer's own")
    samples.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="variables for the template, as '{\"enable_thinking\": false}'; a row's own come first",
    )
    samples.add_argument(
        "--on-loss",
        choices=["error", "keep", "drop-row"],
        default="error",
        help="rows of which the template leaves a text out: train on what is left, or leave them out (default: error)",
    )
    samples.add_argument(
        "--empty-thinking",
        choices=["error", "close"],
        default="error",
        help="answers without thinking where the prompt opens it: close it at once (default: error)",
    )
    samples.add_argument(
        "--overlong", choices=["truncate", "drop", "error"], default="truncate", help="longer rows (default: truncate)"
    )
    samples.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="bad rows (default: stop)")
    samples.add_argument("--no-pack", action="store_true", help="one row a sample")
    samples.add_argument(
        "--pad-to-multiple-of",
        type=int,
        default=1,
        metavar="N",
        help="of each row in a pack: 2 x context-parallel size, times TP with sequence parallelism (default: 1)",
    )
    samples.add_argument("--valid-fraction", type=float, default=0.0, metavar="F", help="set aside as OUTPUT/valid")
    samples.add_argument("--test-fraction", type=float, default=0.0, metavar="F", help="set aside as OUTPUT/test")
    samples.add_argument("--seed", type=int, default=1234, help="decides which rows those are")
    samples.add_argument(
        "--repack", metavar="DIR", help="pack an already prepared folder anew, for another --seq-length; nothing else"
    )
    parser.add_argument(
        "--num-workers", type=int, default=min(os.cpu_count() or 1, 16), metavar="N", help="processes (default: CPUs)"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare, and print what came of it."""
    from eaft_megatron.data.layouts import Columns
    from eaft_megatron.data.prepare import prepare, repack
    from eaft_megatron.data.prepare_options import PrepareOptions

    if args.repack:
        if args.input or args.output or args.tokenizer:
            raise ValueError("--repack DIR changes DIR alone: remove --input, --output and --tokenizer")
        _describe(args.repack, repack(args.repack, args.seq_length, args.pad_to_multiple_of))
        return 0
    for flag in ("input", "tokenizer", "output"):
        if not getattr(args, flag):
            raise ValueError(f"--{flag} is missing")
    names = {name: getattr(args, f"{name}_column") for name in ("messages", "tools", "system", "prompt", "response")}
    options = PrepareOptions(
        seq_length=args.seq_length,
        train_on=args.train_on,
        end_token=args.end_token,
        on_loss=args.on_loss,
        empty_thinking=args.empty_thinking,
        chat_template_kwargs=_variables(args.chat_template_kwargs),
        overlong=args.overlong,
        on_error=args.on_error,
        columns=Columns(**names, text=args.text_column),
        pack=not args.no_pack,
        pad_to_multiple_of=args.pad_to_multiple_of,
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
    )
    manifests = prepare(
        args.input,
        args.tokenizer,
        args.output,
        options,
        chat_template=args.chat_template,
        dataset_split=args.dataset_split,
        dataset_config=args.dataset_config,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        progress=True,
    )
    for part, manifest in manifests.items():
        _describe(args.output if len(manifests) == 1 else os.path.join(args.output, part), manifest)
    return 0


def _variables(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        variables = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--chat-template-kwargs: not JSON, column {error.colno}: {error.msg}") from None
    if not isinstance(variables, dict):
        raise ValueError(f"--chat-template-kwargs must be a JSON object, not {text}")
    return variables


def _describe(folder: str, manifest: dict[str, Any]) -> None:
    counts, packing = manifest["counts"], manifest["packing"]
    print(f"{folder}: {manifest['rows']:,} rows, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained on")
    for name, text in (
        ("rows_with_errors", "input rows skipped for errors"),
        ("rows_with_text_left_out", "rows of which the template leaves a text out (--on-loss)"),
        ("turns_not_trained_by_flag", "turns not trained on, by their own weight, train or loss"),
        ("rows_split_into_turns", "conversations split, one sample a turn (the template drops earlier thinking)"),
        ("tokens_repeated_by_splits", "tokens stand in several samples for it; --train-on last takes one sample a row"),
        ("answers_without_end_token", "answers without an end-of-turn token, whose stop is not trained: --end-token"),
        ("truncated", "rows cut to the sequence length"),
        ("dropped_overlong", "rows dropped, too long"),
        ("dropped_nothing_to_train_on", "rows dropped, nothing to train on"),
    ):
        if counts.get(name):
            print(f"  {counts[name]:,} {text}")
    for error in manifest["errors"][:5]:
        print(f"  {error}")
    if packing:
        print(
            f"  {packing['packs']:,} packs of {packing['seq_length']:,} positions, "
            f"{100 * packing['efficiency']:.1f}% of them filled"
        )
