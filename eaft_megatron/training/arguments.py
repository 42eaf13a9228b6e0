"""The flags of ``eaft_megatron.train``, named as in Megatron-LM's pretrain_gpt."""

from __future__ import annotations

import argparse
from pathlib import Path

from eaft_megatron.hooks.arguments import add_eaft_arguments, named_paths, settings_from_args


def build_parser() -> argparse.ArgumentParser:
    """Every flag with its default. Values are str, int, float or bool only."""
    parser = argparse.ArgumentParser(
        prog="eaft_megatron.train",
        description="Supervised fine-tuning of a Hugging Face model on megatron-core. Run it under torchrun.",
        allow_abbrev=False,
    )
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_parallel(parser.add_argument_group("parallelism and precision"))
    _add_optimization(parser.add_argument_group("optimization"))
    _add_output(parser.add_argument_group("checkpoints and logs"))
    add_eaft_arguments(parser)
    return parser


def parse_arguments(argv: list[str] | None = None, *, world_size: int) -> argparse.Namespace:
    """Parse and check; ``ValueError`` names the flag that is wrong and what to do."""
    args = build_parser().parse_args(argv)
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if min(args.tensor_model_parallel_size, args.pipeline_model_parallel_size) < 1:
        raise ValueError("--tensor-model-parallel-size and --pipeline-model-parallel-size must be >= 1")
    if world_size % model_parallel:
        raise ValueError(
            f"{world_size} process(es) do not divide by --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} x --pipeline-model-parallel-size {args.pipeline_model_parallel_size}: "
            f"start a multiple of {model_parallel} (torchrun --nproc-per-node)"
        )
    args.data_parallel_size = world_size // model_parallel
    _check_batches(args)
    _check_schedule(args)
    _check_data(args)
    settings_from_args(args)
    return args


def _add_model_and_data(group) -> None:
    group.add_argument(
        "--hf-model", required=True, metavar="DIR", help="Hugging Face folder: config, weights, tokenizer"
    )
    group.add_argument(
        "--data",
        default=None,
        metavar="FILE",
        help="JSONL, JSON or Parquet, rows as for `eaft-megatron prepare`; or --sft-data",
    )
    group.add_argument(
        "--eval-data", action="append", default=[], metavar="NAME=FILE", help="an evaluation set; may be repeated"
    )
    group.add_argument("--eval-samples", type=int, default=0, metavar="N", help="first N rows of each set (0: all)")
    group.add_argument("--seq-length", type=int, default=512, metavar="S", help="longest sample in tokens")


def _add_parallel(group) -> None:
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    group.add_argument(
        "--num-virtual-stages-per-pipeline-rank", type=int, default=None, metavar="N", help="interleaved schedule"
    )
    group.add_argument(
        "--use-distributed-optimizer", action="store_true", help="shard the optimizer over data parallel"
    )
    group.add_argument(
        "--transformer-impl", choices=["auto", "local", "transformer_engine"], default="auto", help="auto: TE if found"
    )
    group.add_argument("--bf16", action="store_true", help="bfloat16 weights, float32 master copy (default: float32)")
    group.add_argument("--recompute-granularity", choices=["full", "selective"], default=None)
    group.add_argument("--recompute-method", choices=["uniform", "block"], default=None)
    group.add_argument("--recompute-num-layers", type=int, default=None, metavar="N")
    group.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: gloo, with stand-ins for CUDA")
    group.add_argument("--distributed-timeout-minutes", type=float, default=10.0, metavar="MIN")


def _add_optimization(group) -> None:
    group.add_argument("--micro-batch-size", type=int, default=1, metavar="N")
    group.add_argument("--global-batch-size", type=int, required=True, metavar="N")
    group.add_argument("--train-iters", type=int, required=True, metavar="N")
    group.add_argument("--lr", type=float, default=1e-5)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--lr-decay-style", choices=["cosine", "linear", "constant"], default="cosine")
    group.add_argument("--lr-warmup-fraction", type=float, default=0.03, help="share of --train-iters (default: 0.03)")
    group.add_argument("--weight-decay", type=float, default=0.0)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.999)
    group.add_argument("--adam-eps", type=float, default=1e-8)
    group.add_argument("--seed", type=int, default=1234, help="order of the samples; nothing else is random")


def _add_output(group) -> None:
    group.add_argument("--run-dir", default=None, metavar="DIR", help="metrics.jsonl and TensorBoard events go here")
    group.add_argument("--save", default=None, metavar="DIR", help="checkpoints, in megatron-core's torch_dist format")
    group.add_argument("--save-interval", type=int, default=0, metavar="N", help="iterations (0: at the end only)")
    group.add_argument("--load", default=None, metavar="DIR", help="resume from the newest checkpoint in DIR, if any")
    group.add_argument("--exit-interval", type=int, default=0, metavar="N", help="save and stop at a multiple of N")
    group.add_argument("--exit-signal-handler", action="store_true", help="on SIGUSR1 or SIGTERM save and stop")
    group.add_argument(
        "--exit-duration-in-mins", type=float, default=None, metavar="MIN", help="save and stop after so many minutes"
    )
    group.add_argument("--stop-file", default=None, metavar="FILE", help="save and stop as soon as FILE exists")
    group.add_argument("--export-hf", default=None, metavar="DIR", help="write the result as a Hugging Face folder")
    group.add_argument("--log-interval", type=int, default=1, metavar="N")
    group.add_argument(
        "--eval-interval", type=int, default=0, metavar="N", help="iterations (0: before and after only)"
    )
    group.add_argument("--tensorboard-dir", default=None, metavar="DIR", help="default: RUN_DIR/tensorboard")


def _check_batches(args: argparse.Namespace) -> None:
    for name in ("seq_length", "micro_batch_size", "global_batch_size", "train_iters", "log_interval"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    for name in ("eval_samples", "save_interval", "eval_interval", "exit_interval"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 0, got {getattr(args, name)}")
    stretch = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % stretch:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x data-parallel size {args.data_parallel_size} = {stretch}"
        )
    if args.num_virtual_stages_per_pipeline_rank and args.pipeline_model_parallel_size == 1:
        raise ValueError("--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size > 1")
    stages, micro_batches = args.pipeline_model_parallel_size, args.global_batch_size // stretch
    if args.num_virtual_stages_per_pipeline_rank and micro_batches % stages:
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank needs a number of micro-batches (now {micro_batches}) that is a "
            f"multiple of --pipeline-model-parallel-size {stages}: change --global-batch-size"
        )


def _check_schedule(args: argparse.Namespace) -> None:
    if not 0 <= args.min_lr <= args.lr or args.lr <= 0:
        raise ValueError(f"--lr must be > 0 and --min-lr in [0, lr], got {args.lr} and {args.min_lr}")
    if not 0 <= args.lr_warmup_fraction < 1:
        raise ValueError(f"--lr-warmup-fraction must lie in [0, 1), got {args.lr_warmup_fraction}")
    if args.save_keep_last is not None and (args.save_keep_last < 1 or not args.save):
        raise ValueError(f"--save-keep-last takes a number >= 1, and --save, got {args.save_keep_last}")
    if args.save_interval and not args.save:
        raise ValueError("--save-interval without --save: say where the checkpoints go")
    if args.exit_interval and not args.save:
        raise ValueError("--exit-interval without --save: the work would be lost; say where the checkpoint goes")
    for name in ("exit_signal_handler", "exit_duration_in_mins", "stop_file"):
        if getattr(args, name) and not args.save:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} without --save: the work would be lost; say where the checkpoint goes")
    if args.exit_duration_in_mins is not None and args.exit_duration_in_mins <= 0:
        raise ValueError(f"--exit-duration-in-mins must be > 0, got {args.exit_duration_in_mins}")
    if args.min_lr and args.lr_decay_style == "constant":
        raise ValueError("--min-lr has no meaning with --lr-decay-style constant: remove it")
    if (args.eval_interval or args.eval_samples) and not (args.eval_data or args.sft_eval_data or args.sft_data):
        raise ValueError("--eval-interval and --eval-samples need --eval-data")
    if args.recompute_granularity is None and (args.recompute_method or args.recompute_num_layers):
        raise ValueError("--recompute-method and --recompute-num-layers need --recompute-granularity")
    if args.recompute_granularity == "full" and not (args.recompute_method and args.recompute_num_layers):
        raise ValueError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")


def _check_data(args: argparse.Namespace) -> None:
    """One training set; ``args.eval_sets``: name -> JSONL file or prepared folder."""
    if bool(args.data) == bool(args.sft_data):
        raise ValueError("give either --data FILE.jsonl or --sft-data DIR (what `eaft-megatron prepare` made)")
    files, folders = (
        named_paths(args.eval_data, "--eval-data", "NAME=FILE"),
        named_paths(args.sft_eval_data, "--sft-eval-data"),
    )
    if both := sorted(set(files) & set(folders)):
        raise ValueError(f"--eval-data and --sft-eval-data both name {both[0]!r}")
    args.eval_sets = {**files, **folders}
    if args.sft_packing == "mask" and not (args.sft_data or folders):
        raise ValueError("--sft-packing mask is for prepared folders: `eaft-megatron prepare` the data, or remove it")
    for flag, path in [("--data", args.data), *(("--eval-data", path) for path in files.values())]:
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{flag}: no such file: {path}")
    for flag, path in [("--sft-data", args.sft_data), *(("--sft-eval-data", path) for path in folders.values())]:
        if path is not None and not Path(path).is_dir():
            raise ValueError(f"{flag}: no such folder: {path}")
