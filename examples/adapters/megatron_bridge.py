"""EAFT in Megatron-Bridge, through the forward step that its `pretrain` and `finetune` let a user choose.

    from megatron.bridge.training.finetune import finetune
    from megatron_bridge import eaft_forward_step  # this file, with its folder on PYTHONPATH

    finetune(config, eaft_forward_step(config, LossSettings("eaft")))

Written against Megatron-Bridge v0.6.0 (51885cf, 2026-08-19), whose forward step and report are those of v0.4.2 and
v0.5.1 too. Bridge's models are megatron-core's, so the loss hook does the work; this file joins the two ends.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from eaft_megatron.hooks import LossSettings, install, wrap_forward_step

_SIGNATURES = (
    ("data_iterator", "model"),
    ("data_iterator", "model", "return_schedule_plan"),
    ("state", "data_iterator", "model"),
    ("state", "data_iterator", "model", "return_schedule_plan"),
)


def eaft_forward_step(config: Any, settings: LossSettings, forward_step_func: Callable | None = None) -> Callable:
    """A forward step for Bridge's ``pretrain`` or ``finetune`` that trains as ``settings`` say; installs the hook.

    In Bridge's report "lm loss" becomes the plain cross entropy, and "eaft loss" (what is differentiated), "eaft
    weight", "eaft entropy" and "eaft conflict rate" join it, each ``tensor([sum, count])``, which Bridge adds up over
    micro-batches and the data x context parallel group. An evaluation trains nothing and reports the same keys; of the
    perplexities Bridge prints beside each of them only that of "lm loss" means anything.

    Args:
        config: Bridge's ``ConfigContainer``. Its ``model.vocab_size`` is the true vocabulary where ``settings`` name
            none.
        settings: the loss. Gates that take statistics of a batch (percentiles, the conflict mask, TALR's median) are
            refused by the hook in the first step: Bridge's own step does not give the model its loss mask.
        forward_step_func: a step of any signature that Bridge accepts, whose loss function is
            ``partial(masked_next_token_loss, loss_mask, ...)``. None: ``megatron.bridge.training.gpt_step``'s.

    Raises:
        ValueError: the true vocabulary is not known, the step's signature is none of Bridge's, or a hook is installed
            already. In the first step: the loss function is not of that form, as when a model is distilled.
    """
    if forward_step_func is None:
        from megatron.bridge.training.gpt_step import forward_step as forward_step_func
    _check_signature(forward_step_func)
    settings = dataclasses.replace(settings, true_vocab_size=_true_vocab_size(config, settings))
    hook = install(settings)
    # Bridge decides by this function's signature whether to pass its state: functools.wraps inside keeps that visible.
    return wrap_forward_step(forward_step_func, hook)


def _true_vocab_size(config: Any, settings: LossSettings) -> int:
    """What the settings say, else the model's: Bridge keeps ``vocab_size`` unpadded and pads when it builds."""
    if settings.true_vocab_size is not None:
        return settings.true_vocab_size
    from_tokenizer = getattr(getattr(config, "tokenizer", None), "use_tokenizer_vocab_size", False)
    size = getattr(config.model, "vocab_size", None)
    if size is None or from_tokenizer:
        raise ValueError(
            "config.model.vocab_size is not set yet (Bridge takes the tokenizer's in its setup): give the true "
            "vocabulary, LossSettings(..., true_vocab_size=N)"
        )
    return size


def _check_signature(forward_step_func: Callable) -> None:
    names = tuple(inspect.signature(forward_step_func).parameters)
    known = ("state", *names[1:]) if names[:1] == ("global_state",) else names
    if known not in _SIGNATURES:
        raise ValueError(
            f"forward_step_func takes ({', '.join(names)}); Megatron-Bridge calls ([state, ]data_iterator, model[, "
            "return_schedule_plan])"
        )
