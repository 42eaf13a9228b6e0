"""Flags: those that the hooks look at, and what the small loop needs."""

import argparse
import os


def add_megatron_arguments(parser):
    parser.add_argument("--train-iters", type=int, default=2)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--distributed-backend", default="nccl")
    parser.add_argument("--use-legacy-models", action="store_true")
    parser.add_argument("--use-torch-fsdp2", action="store_true")
    parser.add_argument("--cross-entropy-loss-fusion", action="store_true")
    parser.add_argument("--cross-entropy-fusion-impl", choices=["native", "te"], default="native")
    parser.add_argument(
        "--no-check-for-nan-in-loss-and-grad", action="store_false", dest="check_for_nan_in_loss_and_grad"
    )
    parser.add_argument("--calculate-per-token-loss", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--loss-scale", type=float)
    parser.add_argument("--export-kd-teacher-load")
    parser.add_argument("--logits-load-dir")
    parser.add_argument("--logits-save-dir")
    parser.add_argument("--cuda-graph-impl", default="none")
    parser.add_argument("--cuda-graph-scope", nargs="*", default=[])
    parser.add_argument("--enable-cuda-graph", action="store_true")
    parser.add_argument("--perform-rl-step", action="store_true")
    parser.add_argument("--multiple-validation-sets", action="store_true")
    parser.add_argument("--yaml-cfg")
    for flag, default in (("seq-length", 24), ("micro-batch-size", 1), ("global-batch-size", 8), ("seed", 7)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag, default in (("context-parallel-size", 1), ("pipeline-model-parallel-size", 1), ("eval-iters", 1)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dataloader-type", default="single")
    parser.add_argument("--transformer-impl", default="local")
    parser.add_argument(
        "--no-create-attention-mask-in-dataloader", action="store_false", dest="create_attention_mask_in_dataloader"
    )
    parser.add_argument("--load")
    parser.add_argument("--save")
    parser.add_argument(
        "--report", choices=["tensor", "tuple", "scalar"], default="tensor", help="of the loss function"
    )
    parser.add_argument("--poison", type=float, help="a value to overwrite a logit with")
    parser.add_argument("--without-model-loss", action="store_true", help="the script computes the loss itself")
    return parser


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_megatron_arguments(parser)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    args = parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args()
    if args.yaml_cfg is not None:
        args = argparse.Namespace(yaml_cfg=args.yaml_cfg)
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return args


def validate_args(args, defaults={}):  # noqa: B006
    if args.fp16 and args.loss_scale is None:
        args.check_for_nan_in_loss_and_grad = False
    return args


def parse_and_validate_args(extra_args_provider=None, ignore_unknown_args=False, args_defaults={}):  # noqa: B006
    """0.18 and later: the script parses, and calls pretrain afterwards."""
    from .global_vars import set_args

    args = parse_args(extra_args_provider, ignore_unknown_args)
    validate_args(args, args_defaults)
    set_args(args)
    return args
