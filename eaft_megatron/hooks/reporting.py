"""Our metrics in Megatron-LM's evaluation, and the watch over its first training step."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Any

from eaft_megatron.hooks.loss_hook import LossHook, rebind
from eaft_megatron.hooks.metrics import METRICS, WEIGHT_METRICS


def watch_training(hook: LossHook) -> None:
    """See that the hook is called in the first step, and keep our metrics out of Megatron's perplexities."""
    from eaft_megatron.megatron_map import training

    rebind(hook, training, "train_step", _checking_first_step(hook, training.train_step))
    kept: list[dict[str, float]] = []
    rebind(hook, training, "evaluate", _keeping_metrics(kept, training.evaluate))
    rebind(hook, training, "evaluate_and_print_results", _printing_metrics(kept, training.evaluate_and_print_results))


def _checking_first_step(hook: LossHook, train_step: Callable) -> Callable:
    checked = False

    @functools.wraps(train_step)
    def step(*args: Any, **kwargs: Any):
        nonlocal checked
        result = train_step(*args, **kwargs)
        if not checked:
            checked = True
            from eaft_megatron.megatron_map import parallel_state

            if parallel_state.is_pipeline_last_stage(ignore_virtual=True) and not (hook.calls or hook.replayed):
                raise RuntimeError(
                    f"{hook.name}: the first step is over and the loss hook was never "
                    "called; the model computes its loss elsewhere"
                )
        return result

    return step


def _keeping_metrics(kept: list[dict[str, float]], evaluate: Callable) -> Callable:
    """Megatron prints "<key> PPL" for whatever was evaluated, which makes sense for "lm loss" alone."""

    @functools.wraps(evaluate)
    def without_metrics(*args: Any, **kwargs: Any):
        result = evaluate(*args, **kwargs)
        losses = result[0] or {}  # empty before the last stage, None when the time is up
        kept.append({name: float(losses.pop(name)) for name in METRICS[1:] + WEIGHT_METRICS if name in losses})
        return result

    return without_metrics


def _printing_metrics(kept: list[dict[str, float]], evaluate_and_print_results: Callable) -> Callable:
    signature = inspect.signature(evaluate_and_print_results)

    @functools.wraps(evaluate_and_print_results)
    def with_metrics(*args: Any, **kwargs: Any):
        from eaft_megatron.megatron_map import training

        arguments = signature.bind(*args, **kwargs).arguments
        kept.clear()
        result = evaluate_and_print_results(*args, **kwargs)
        iteration = arguments["iteration"]
        writer = training.get_tensorboard_writer() if arguments.get("write_to_tensorboard", True) else None
        for index, metrics in enumerate(kept):
            if metrics:
                suffix = _suffix(training.get_args(), index)
                line = " | ".join(f"{name}: {value:.6E}" for name, value in metrics.items())
                training.print_rank_last(f" validation{suffix} at {arguments['prefix']} | {line} | ")
                named = {f"{name} validation{suffix}": value for name, value in metrics.items()}
                _write_curves(training, writer, named, iteration)
        return result

    return with_metrics


def _write_curves(training: Any, writer: Any, named: dict[str, float], iteration: int) -> None:
    """To TensorBoard, and to wandb where Megatron itself writes there."""
    if not writer:
        return
    for name, value in named.items():
        writer.add_scalar(name, value, iteration)
        writer.add_scalar(f"{name} vs samples", value, getattr(training.get_args(), "consumed_train_samples", 0))
    wandb = training.get_wandb_writer()
    if wandb and training.is_last_rank():
        wandb.log(named, iteration)


def _suffix(args: argparse.Namespace, index: int) -> str:
    """What Megatron puts behind "validation" where it evaluates several sets."""
    if not getattr(args, "multiple_validation_sets", False):
        return ""
    names = getattr(args, "validation_set_names", None)
    return f"-{names[index] if names else index}"
