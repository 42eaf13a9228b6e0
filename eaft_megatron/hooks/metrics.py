"""Extra metrics in the host's own report, summed exactly as the host sums its own loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaft_megatron.hooks.loss_hook import LossHook, Observation, installed
from eaft_megatron.loss.gates import confident_conflicts

METRICS = ("lm loss", "eaft loss", "eaft weight", "eaft entropy", "eaft conflict rate")
"""Keys of the report, in order. ``lm loss`` is the plain cross entropy over the true vocabulary."""

WEIGHT_METRICS = ("eaft zero weight", "eaft weight on conflicts", "eaft weight elsewhere")
"""Further keys where the weight follows a probability: share of tokens with weight 0; mean weight of the confident
conflicts (0 where there are none) and of the other tokens."""

_NO_TOKEN = 1e-9  # a count that makes 0 / count 0, and is lost when it is added to a real one


def metric_names(hook: LossHook | None) -> tuple[str, ...]:
    """The keys that this hook's reports have."""
    return METRICS + WEIGHT_METRICS if hook is not None and hook.gate.uses_probability else METRICS


def metric_sums(observation: Observation, loss_mask: Tensor) -> dict[str, Tensor]:
    """Sums over the micro-batch's valid tokens, scalars float32; divide by the sum of ``loss_mask`` for means."""
    stats = observation.stats
    mask = loss_mask.reshape(stats.ce.shape).float()
    conflict = confident_conflicts(stats)
    assert stats.entropy is not None and stats.weight is not None, "statistics are asked for"
    per_token = (stats.ce, observation.loss, stats.weight, stats.entropy, conflict.float())
    # Masked tokens hold 0, but 0 * mask would let a NaN of a token that the host masks late slip in.
    return {
        name: torch.where(mask != 0, value * mask, 0).sum().float()
        for name, value in zip(METRICS, per_token, strict=True)
    }


def weight_sums(observation: Observation, loss_mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """:data:`WEIGHT_METRICS` of the micro-batch, each a sum and what to divide it by, scalars float32."""
    stats, weight = observation.stats, observation.stats.weight
    assert weight is not None
    mask = loss_mask.reshape(stats.ce.shape).float()
    conflict = confident_conflicts(stats)

    def over(part: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.where(part, mask, 0)
        total = torch.where(counts != 0, value * counts, 0).sum().float()
        return total, counts.sum().clamp(min=_NO_TOKEN)

    everything = torch.ones_like(conflict)
    sums = (over(everything, (weight == 0).float()), over(conflict, weight), over(~conflict, weight))
    return dict(zip(WEIGHT_METRICS, sums, strict=True))


def wrap_forward_step(forward_step_func: Callable, hook: LossHook | None = None) -> Callable:
    """``forward_step_func`` with a loss function whose report also holds :data:`METRICS`, and
    :data:`WEIGHT_METRICS` where the weight follows a probability.

    The loss function must be a ``functools.partial`` whose first argument is the loss mask, as in pretrain_gpt and
    its relatives. Its report must hold "lm loss" as ``tensor([sum, count])`` (Megatron-LM 0.13 on), as
    ``(sum, count)`` summed over data-parallel ranks already (0.12), or as a scalar mean (forks of older releases);
    the metrics come in the same form, and "lm loss" becomes the plain cross entropy.

    Args:
        forward_step_func: ``(data_iterator, model, ...) -> (output, loss_func, ...)``.
        hook: what :func:`install` returned. None: whatever is installed when a step runs, and if nothing is, the
            step is left as it is.
    """

    @functools.wraps(forward_step_func)
    def forward_step(*args: Any, **kwargs: Any):
        active = hook or installed()
        if active is None:
            return forward_step_func(*args, **kwargs)
        before = active.calls
        output, loss_func, *rest = forward_step_func(*args, **kwargs)
        if not (isinstance(loss_func, functools.partial) and loss_func.args):
            raise ValueError(
                "forward_step must return functools.partial(loss_func, loss_mask, ...) as its loss function"
            )
        return output, _with_metrics(loss_func, active, before), *rest

    return forward_step


def _with_metrics(loss_func: functools.partial, hook: LossHook, calls_before: int) -> Callable:
    loss_mask = loss_func.args[0]

    @functools.wraps(loss_func.func)
    def with_metrics(output_tensor: Tensor, *args: Any, **kwargs: Any):
        result = loss_func(output_tensor, *args, **kwargs)
        if kwargs.get("non_loss_data"):  # asked for at evaluation, where a script passes process_non_loss_data_func
            return result
        if hook.latest is None or (hook.calls == calls_before and not hook.replayed):
            raise RuntimeError(
                f"{hook.name}: the loss hook was not called in this forward pass; the model computes its loss elsewhere"
            )
        *head, report = result
        if hook.check_finite and not bool(torch.isfinite(head[0]).all()):
            raise RuntimeError(f"the loss of this micro-batch is {head[0].tolist()}: NaN or inf in the forward pass")
        if not (isinstance(report, dict) and "lm loss" in report):
            raise ValueError(f"the loss function must report 'lm loss', got {report!r}")
        sums: dict[str, tuple[Tensor, Tensor | None]] = {
            name: (total, None) for name, total in metric_sums(hook.latest, loss_mask).items()
        }
        if hook.gate.uses_probability:
            sums |= weight_sums(hook.latest, loss_mask)
        report.update(_in_form_of(report["lm loss"], sums, loss_mask))
        return *head, report

    return with_metrics


def _in_form_of(lm_loss: Any, sums: dict[str, tuple[Tensor, Tensor | None]], loss_mask: Tensor) -> dict[str, Any]:
    """The metrics as the host reports its own loss, so that it averages them in the same way.

    A metric's own divisor takes the place of the number of tokens; None: that number.
    """
    if isinstance(lm_loss, Tensor) and lm_loss.numel() == 2:
        tokens = lm_loss.view(-1)[1]
        return {
            name: torch.stack([total.to(lm_loss), tokens if count is None else count.to(lm_loss)]).view(lm_loss.shape)
            for name, (total, count) in sums.items()
        }
    totals = torch.stack([total for total, _ in sums.values()])
    counts = torch.stack([loss_mask.sum().float() if count is None else count for _, count in sums.values()])
    if isinstance(lm_loss, (tuple, list)) and len(lm_loss) == 2:
        totals, counts = _sum_over_data_parallel(torch.stack([totals, counts]))
        return {
            name: (total, lm_loss[1] if divisor is None else count)
            for (name, (_, divisor)), total, count in zip(sums.items(), totals, counts, strict=True)
        }
    if isinstance(lm_loss, Tensor) and lm_loss.numel() == 1:
        totals, counts = _sum_over_data_parallel(torch.stack([totals, counts]))
        means = (totals / counts.masked_fill(counts == 0, 1)).to(lm_loss.dtype)  # 0 where no token counts
        return {name: mean.view(lm_loss.shape) for name, mean in zip(sums, means, strict=True)}
    raise ValueError(
        f"the report's 'lm loss' must be tensor([sum, count]), (sum, count) or a scalar tensor, got {lm_loss!r}"
    )


def _sum_over_data_parallel(values: Tensor) -> Tensor:
    from eaft_megatron.megatron_map import parallel_state

    torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return values
