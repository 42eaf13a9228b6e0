"""Extra metrics in the host's own report, summed exactly as the host sums its own loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.hooks.loss_hook import LossHook, Observation

CONFLICT_ENTROPY = 0.17
"""A token is a confident conflict below this normalised entropy, H / ln K (the centre of the paper's sigmoid) ..."""
CONFLICT_PROBABILITY = 0.1
"""... and below this probability of its label."""

METRICS = ("lm loss", "eaft loss", "eaft weight", "eaft entropy", "eaft conflict rate")
"""Keys of the report, in order. ``lm loss`` is the plain cross entropy over the true vocabulary."""


def metric_sums(observation: Observation, loss_mask: Tensor) -> dict[str, Tensor]:
    """Sums over the micro-batch's valid tokens, scalars float32; divide by the sum of ``loss_mask`` for means."""
    stats = observation.stats
    mask = loss_mask.reshape(stats.ce.shape).float()
    conflict = (stats.normalized_entropy() < CONFLICT_ENTROPY) & (stats.probability < CONFLICT_PROBABILITY)
    per_token = (stats.ce, observation.loss, stats.weight, stats.entropy, conflict.float())
    # Masked tokens hold 0, but 0 * mask would let a NaN of a token that the host masks late slip in.
    return {
        name: torch.where(mask != 0, value * mask, 0).sum().float()
        for name, value in zip(METRICS, per_token, strict=True)
    }


def wrap_forward_step(forward_step_func: Callable, hook: LossHook) -> Callable:
    """``forward_step_func`` with a loss function whose report also holds :data:`METRICS`.

    The loss function must be a ``functools.partial`` whose first argument is the loss mask, as in pretrain_gpt and
    its relatives, and report ``{"lm loss": tensor([sum, count])}`` (megatron-core 0.13 on).
    """

    @functools.wraps(forward_step_func)
    def forward_step(*args: Any, **kwargs: Any):
        before = hook.calls
        output, loss_func, *rest = forward_step_func(*args, **kwargs)
        if not (isinstance(loss_func, functools.partial) and loss_func.args):
            raise ValueError(
                "forward_step must return functools.partial(loss_func, loss_mask, ...) as its loss function"
            )
        return output, _with_metrics(loss_func, hook, before), *rest

    return forward_step


def _with_metrics(loss_func: functools.partial, hook: LossHook, calls_before: int) -> Callable:
    loss_mask = loss_func.args[0]

    @functools.wraps(loss_func.func)
    def with_metrics(output_tensor: Tensor, *args: Any, **kwargs: Any):
        result = loss_func(output_tensor, *args, **kwargs)
        if hook.latest is None or (hook.calls == calls_before and not hook.replayed):
            raise RuntimeError(
                f"--loss-type {hook.settings.loss_type}: the loss hook was not called in this forward pass; "
                "the model computes its loss elsewhere"
            )
        *head, report = result
        own = report.get("lm loss")
        if not (isinstance(own, Tensor) and own.shape == (2,)):
            raise ValueError(f"the report's 'lm loss' must be tensor([sum, count]), got {own!r}")
        for name, total in metric_sums(hook.latest, loss_mask).items():
            report[name] = torch.stack([total.to(own), own[1]])
        return *head, report

    return with_metrics
