"""``eaft-megatron convert``: Hugging Face folder <-> Megatron-LM checkpoint."""

from __future__ import annotations

import argparse
import shlex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of both directions."""
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    forth = directions.add_parser("to-megatron", help="write what pretrain_gpt.py loads with --load DIR --finetune")
    forth.add_argument("hf_dir", help="a local Hugging Face folder: config.json, *.safetensors, tokenizer")
    forth.add_argument("megatron_dir", help="the folder to write")
    forth.add_argument(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help="which implementation the printed flags ask for; the weights fit both",
    )
    forth.add_argument(
        "--pipeline-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="stages that the printed pattern for pretrain_hybrid.py marks (default: 1)",
    )
    back = directions.add_parser("to-hf", help="write what transformers loads with from_pretrained")
    back.add_argument("megatron_dir", help="what to-megatron wrote, a training run's --save folder, or an iter_NNNNNNN")
    back.add_argument("hf_dir", help="the folder to write")
    back.add_argument("--hf-config", metavar="DIR", help="Hugging Face folder of the model (default: MEGATRON_DIR/hf)")
    for direction in (forth, back):
        direction.add_argument("--check", action="store_true", help="read all of it back and compare it bit by bit")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what to do next."""
    from eaft_megatron.models.convert import convert_to_hf, convert_to_megatron

    if args.direction == "to-hf":
        convert_to_hf(args.megatron_dir, args.hf_dir, hf_config_dir=args.hf_config, check=args.check, progress=True)
        print(f"{args.hf_dir} is written")
        return 0
    record = convert_to_megatron(
        args.hf_dir, args.megatron_dir, transformer_impl=args.transformer_impl, check=args.check, progress=True
    )
    print(f"{args.megatron_dir} is written")
    if record["pretrain_gpt_flags"] is None:
        print(f"pretrain_gpt.py cannot build this model: {record['flags_refused']}")
    else:
        print("flags for pretrain_gpt.py:")
        print(shlex.join(["--load", args.megatron_dir, "--finetune", *record["pretrain_gpt_flags"]]))
        _print_hybrid_flags(args)
        print(f"and with eaft_megatron.run: --true-vocab-size {record['true_vocab_size']}")
    return 0


def _print_hybrid_flags(args: argparse.Namespace) -> None:
    """HybridModel loads the same checkpoint; what it cannot build is said."""
    from eaft_megatron.models.hf_config import read_hf_config
    from eaft_megatron.models.pretrain_flags import pretrain_hybrid_flags

    stages = args.pipeline_model_parallel_size
    try:
        flags = pretrain_hybrid_flags(read_hf_config(args.hf_dir), pipeline_model_parallel_size=stages)
    except ValueError as error:
        print(f"pretrain_hybrid.py cannot build this model: {error}")
        return
    print("or for pretrain_hybrid.py (Megatron-LM 0.19 on), from the same checkpoint:")
    print(shlex.join(["--load", args.megatron_dir, "--finetune", *flags]))
