"""Settings of Megatron-LM under which our loss would not be what is trained: each is refused, none ignored."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from eaft_megatron.megatron_map import CHECKS_THE_FIRST_LOSS

_REFUSED: tuple[tuple[Callable[[argparse.Namespace], bool], str], ...] = (
    (
        lambda args: getattr(args, "use_legacy_models", False),
        "--use-legacy-models computes its loss outside megatron-core: remove it",
    ),
    (
        lambda args: (
            getattr(args, "cross_entropy_loss_fusion", False)
            and getattr(args, "cross_entropy_fusion_impl", "native") != "native"
        ),
        "--cross-entropy-loss-fusion with --cross-entropy-fusion-impl other than native asks for another loss kernel: "
        "remove both, this loss is fused already",
    ),
    (
        lambda args: bool(getattr(args, "export_kd_teacher_load", None)),
        "--export-kd-teacher-load (knowledge distillation) replaces the model's loss: remove it",
    ),
    (
        lambda args: bool(getattr(args, "logits_load_dir", None)),
        "--logits-load-dir (distillation from cached logits) replaces the model's loss: remove it",
    ),
    (
        lambda args: bool(getattr(args, "logits_save_dir", None)),
        "--logits-save-dir replaces the model's loss by one that only saves its logits: remove it",
    ),
    (
        lambda args: _graphs_whole_iterations(args),
        "CUDA graphs of whole iterations (full_iteration) turn off the check for NaN that this loss relies on: capture "
        "layers only",
    ),
    (
        lambda args: bool(getattr(args, "perform_rl_step", False)),
        "--perform-rl-step trains on its own objective: remove it",
    ),
    (
        lambda args: getattr(args, "check_for_nan_in_loss_and_grad", True) is False and not _own_doing(args),
        "--no-check-for-nan-in-loss-and-grad would let NaN or inf logits train on: remove it",
    ),
    (
        lambda args: bool(getattr(args, "label_smoothing", 0)),
        "--label-smoothing is not part of this loss: remove it",
    ),
)

_REFUSED_WITH_CHUNKS = {  # Megatron's argument -> its flag
    "use_torch_fsdp2": "--use-torch-fsdp2",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_custom_fsdp": "--use-custom-fsdp",
    "defer_embedding_wgrad_compute": "--defer-embedding-wgrad-compute",
    "config_logger_dir": "--config-logger-dir",
}


def refuse_unsupported(args: argparse.Namespace) -> None:
    """``ValueError`` naming the first flag that takes the loss elsewhere, and the way out."""
    for applies, message in _REFUSED:
        if applies(args):
            raise ValueError(f"--loss-type {args.loss_type}: {message}; or train with --loss-type sft")
    for name, flag in _REFUSED_WITH_CHUNKS.items() if args.eaft_linear_chunk else ():
        if getattr(args, name, None):
            raise ValueError(f"--eaft-linear-chunk cannot serve {flag}: remove one of them")


def uneven_averages(args: argparse.Namespace) -> str | None:
    """What is wrong with context parallelism without --calculate-per-token-loss, Megatron's own loss included."""
    if getattr(args, "context_parallel_size", 1) == 1 or getattr(args, "calculate_per_token_loss", False):
        return None
    return (
        f"--context-parallel-size {args.context_parallel_size} without --calculate-per-token-loss: each rank's part of "
        "a sample is averaged by itself, however few of its tokens count, so that the gradient changes with the size: "
        "give --calculate-per-token-loss"
    )


def turns_off_nan_check(args: argparse.Namespace, version: tuple[int, int]) -> bool:
    """Whether Megatron itself may look for no NaN in the loss, so that we have to.

    Before 0.14 its rerun state machine, where it is on, lets the first iteration of every process pass unchecked.
    """
    if getattr(args, "check_for_nan_in_loss_and_grad", True) is False:
        return True
    return version < CHECKS_THE_FIRST_LOSS and getattr(args, "rerun_mode", "disabled") != "disabled"


def _own_doing(args: argparse.Namespace) -> bool:
    """fp16 with a dynamic loss scale: Megatron turns the check off, for gradients may overflow."""
    return bool(getattr(args, "fp16", False)) and not getattr(args, "loss_scale", None)


def _graphs_whole_iterations(args: argparse.Namespace) -> bool:
    """In the words of 0.12 to 0.14 (enable_cuda_graph), of 0.15 to 0.17 (a scope), and of later releases (an impl)."""
    implementation = getattr(args, "cuda_graph_impl", None)
    if implementation == "full_iteration":
        return True
    on = getattr(args, "enable_cuda_graph", False) or implementation not in (None, "none")
    return bool(on) and "full_iteration" in str(getattr(args, "cuda_graph_scope", ""))
