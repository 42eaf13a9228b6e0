"""Megatron-LM's training loop: flags, start, report. What ``run`` rebinds and what the patches call.

Read in core_v0.12.3 to core_v0.19.0: ``parse_args`` looks ``add_megatron_arguments`` up as a module global,
``validate_args`` follows it, ``pretrain`` takes the forward step as the argument ``forward_step_func``, and
``train_step``, ``evaluate`` and ``evaluate_and_print_results`` are module globals of ``megatron.training.training``.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eaft_megatron.hooks.arguments import add_eaft_arguments, named_paths, settings_from_args
from eaft_megatron.hooks.evaluation import evaluate_sets
from eaft_megatron.hooks.hybrid_checks import check_hybrid
from eaft_megatron.hooks.loss_hook import check_own_gate, install, installed
from eaft_megatron.hooks.masked_packs import check_built_models
from eaft_megatron.hooks.metrics import wrap_forward_step
from eaft_megatron.hooks.refusals import refuse_unsupported, turns_off_nan_check, uneven_averages
from eaft_megatron.hooks.reporting import watch_training
from eaft_megatron.hooks.resumption import carry_record, guard_resumption, true_vocab_size
from eaft_megatron.hooks.retention import keep_last_checkpoints
from eaft_megatron.hooks.settings import LossSettings
from eaft_megatron.hooks.side_columns import rebind_get_batch
from eaft_megatron.loss.gate import Gate
from eaft_megatron.megatron_map import release, validate_args_modules

if TYPE_CHECKING:
    from eaft_megatron.hooks.prepared_source import PreparedSource

_NO_YAML = "--yaml-cfg replaces the parsed flags, --loss-type among them: give flags instead of a YAML file"


def attach(
    args: argparse.Namespace,
    forward_step_func: Callable | None = None,
    *,
    prepared: PreparedSource | None = None,
    gate: Gate | None = None,
) -> Callable | None:
    """Make Megatron-LM's training loop train with the loss that its parsed and validated ``args`` ask for.

    Call it once, after Megatron's own checks of the flags and before ``pretrain`` builds the model. With
    ``--loss-type sft`` Megatron's own loss runs, untouched.

    Args:
        args: Megatron-LM's flags, ours among them.
        forward_step_func: to be given our metrics.
        prepared: what opens ``--sft-data``, :class:`eaft_megatron.hooks.prepared_source.PreparedSource`; from ``run``.
        gate: one of your own, instead of ``--loss-type``; its ``repr`` is kept in ``args``, and a run that resumes a
            checkpoint must have the same.

    Returns:
        ``forward_step_func`` with our metrics in its report (None if none was given).

    Raises:
        ValueError: a flag is wrong, or takes the loss where the hook cannot reach it.
    """
    if not hasattr(args, "loss_type"):
        raise ValueError(_NO_YAML)
    settings = settings_from_args(args)
    if gate is not None:
        _note_own_gate(args, settings, gate)
    check_hybrid(args)
    guard_resumption()
    carry_record(args)
    keep_last_checkpoints(args)
    if settings.loss_type == "sft" and gate is None:
        if settings.linear_chunk is not None:
            raise ValueError("--eaft-linear-chunk: --loss-type sft is Megatron's own loss, of whole logits: remove it")
        if (wrong := uneven_averages(args)) and getattr(args, "rank", 0) == 0:
            warnings.warn(wrong, stacklevel=2)
        _say_what_sft_ignores(args)
        _open_data(args, settings.gate(), prepared)
        return forward_step_func
    args.true_vocab_size = true_vocab_size(args)
    settings = settings_from_args(args)
    active = installed()
    if active is None:
        refuse_unsupported(args)
        if wrong := uneven_averages(args):
            raise ValueError(wrong)
        _refuse_without_scores(args, gate or settings.gate())
        active = install(settings, gate=gate)
        active.check_finite = turns_off_nan_check(args, release())
        _advise(args)
        watch_training(active)
        _open_data(args, active.gate, prepared)
    elif active.settings != settings or active.own_gate != gate:
        raise ValueError("the loss hook is installed already, with other settings than the flags: give one of them")
    return None if forward_step_func is None else wrap_forward_step(forward_step_func, active)


def _note_own_gate(args: argparse.Namespace, settings: LossSettings, gate: Gate) -> None:
    if settings.loss_type != "sft":
        raise ValueError(f"attach(gate={gate!r}) takes the place of --loss-type {settings.loss_type}: remove the flag")
    check_own_gate(gate, settings)
    args.eaft_own_gate = repr(gate)  # a plain text: Megatron pickles its arguments into checkpoints


def _say_what_sft_ignores(args: argparse.Namespace) -> None:
    for flag, value, default in (
        ("--true-vocab-size", args.true_vocab_size, None),
        ("--eaft-topk", args.eaft_topk, 20),
    ):
        if value != default and getattr(args, "rank", 0) == 0:
            warnings.warn(f"{flag} has no effect with --loss-type sft, which is Megatron's own loss", stacklevel=3)


def _open_data(args: argparse.Namespace, gate: Gate, prepared: PreparedSource | None) -> None:
    """Open --sft-data, and have its evaluation sets evaluated one by one; last, so that it sees our wrappers."""
    if not args.sft_data:
        if args.sft_eval_data or args.sft_packing != "auto":
            raise ValueError("--sft-eval-data and --sft-packing are for --sft-data DIR, which is missing")
        return
    if prepared is not None and prepared.current is not None:
        return  # Megatron has its flags validated twice
    if prepared is None:
        raise ValueError("--sft-data needs `python -m eaft_megatron.run SCRIPT ...`; a patched checkout cannot read it")
    args.sft_eval_sets = named_paths(args.sft_eval_data, "--sft-eval-data")
    data = prepared.open(args, gate, release())
    args.sft_data_sha256 = data.fingerprint()
    first = getattr(args, "rank", 0) == 0
    if first:
        print("\n".join(data.describe()), flush=True)
    if not data.evaluation and args.eval_iters:
        args.eval_iters = 0
        if first:
            print("no --sft-eval-data: nothing is evaluated (--eval-iters 0)", flush=True)
    if data.layout.packed and not data.layout.thd:
        check_built_models()
    evaluate_sets(prepared.evaluation_sets, prepared.evaluation_dataset)


def rebind_megatron(prepared: PreparedSource | None = None) -> None:
    """Have Megatron-LM's modules take the loss flags and call :func:`attach` themselves; scripts stay untouched.

    Args:
        prepared: what opens ``--sft-data``, see :func:`attach`; None: the flag is refused.

    Raises:
        ValueError: this Megatron-LM is not one we know: what is missing is named.
    """
    from eaft_megatron.megatron_map import arguments, training
    from eaft_megatron.megatron_map import training_package as package

    for owner, name in (
        (arguments, "add_megatron_arguments"),
        (arguments, "validate_args"),
        (training, "pretrain"),
        (training, "train_step"),
        (training, "evaluate"),
        (training, "evaluate_and_print_results"),
    ):
        if not callable(getattr(owner, name, None)):
            raise ValueError(f"{owner.__name__} of this Megatron-LM has no {name}: unknown version; see patches/")
    if "forward_step_func" not in inspect.signature(training.pretrain).parameters:
        raise ValueError("pretrain() of this Megatron-LM takes no forward_step_func: unknown version; see patches/")
    arguments.add_megatron_arguments = _with_our_flags(arguments.add_megatron_arguments)
    validate = _attaching(arguments.validate_args, prepared)
    pretrain = _with_our_forward_step(training.pretrain, prepared)
    if prepared is not None:
        prepared.carries_columns = rebind_get_batch(prepared.columns, prepared.cut)
    for module in validate_args_modules():
        module.validate_args = validate
    training.pretrain = package.pretrain = pretrain


def _with_our_flags(add_megatron_arguments: Callable) -> Callable:
    @functools.wraps(add_megatron_arguments)
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        refuse_taken_flag(parser)
        # parse_args goes through it too
        parser.parse_known_args = _refusing_yaml(parser.parse_known_args)  # type: ignore[method-assign]
        return add_eaft_arguments(parser)

    return add


def _refusing_yaml(parse_known_args: Callable) -> Callable:
    """With --yaml-cfg Megatron throws the parsed flags away, and calls another function than validate_args."""

    @functools.wraps(parse_known_args)
    def parse(*args: Any, **kwargs: Any):
        parsed, rest = parse_known_args(*args, **kwargs)
        if getattr(parsed, "yaml_cfg", None) is not None and parsed.loss_type != "sft":
            raise ValueError(_NO_YAML)
        return parsed, rest

    return parse


def refuse_taken_flag(parser: argparse.ArgumentParser) -> None:
    """``ValueError`` if the script's own parser has a flag of ours already."""
    ours = argparse.ArgumentParser(add_help=False)
    add_eaft_arguments(ours)
    taken = sorted(set(ours._option_string_actions) & set(parser._option_string_actions))
    if taken:
        raise ValueError(taken_flag_message(taken[0]))


def taken_flag_message(flag: str) -> str:
    """What to do where the script defines a flag of ours."""
    return (
        f"this script defines {flag} itself, so it cannot choose the loss here. Call "
        "eaft_megatron.hooks.install(LossSettings(...)) from Python instead, and start it without eaft_megatron.run "
        "(as in a checkout that carries one of our patches)"
    )


def _attaching(validate_args: Callable, prepared: PreparedSource | None) -> Callable:
    @functools.wraps(validate_args)
    def validate(args: argparse.Namespace, *rest: Any, **kwargs: Any):
        result = validate_args(args, *rest, **kwargs)
        attach(args, prepared=prepared)
        return result

    return validate


def _with_our_forward_step(pretrain: Callable, prepared: PreparedSource | None) -> Callable:
    signature = inspect.signature(pretrain)

    @functools.wraps(pretrain)
    def with_metrics(*args: Any, **kwargs: Any):
        bound = signature.bind(*args, **kwargs)
        # The flags may not have been parsed yet (0.12 to 0.17): whether there is a hook, each step looks up.
        bound.arguments["forward_step_func"] = wrap_forward_step(bound.arguments["forward_step_func"])
        if prepared is not None:
            datasets = "train_valid_test_dataset_provider"
            bound.arguments[datasets] = prepared.provider(bound.arguments[datasets])
        return pretrain(*bound.args, **bound.kwargs)

    return with_metrics


def _refuse_without_scores(args: argparse.Namespace, gate: Gate) -> None:
    if (columns := gate.needs_side) and not args.sft_data:
        name = getattr(args, "eaft_own_gate", f"--loss-type {args.loss_type}")
        raise ValueError(
            f"{name} needs scores of the frozen base model ({', '.join(columns)}) beside the "
            "data, which this script's own batches do not carry: `eaft-megatron prepare` the data, `eaft-megatron "
            "score` it, and give --sft-data"
        )


def _advise(args: argparse.Namespace) -> None:
    """Say on rank 0 what is allowed and seldom meant."""
    if getattr(args, "rank", 0) != 0:
        return
    if not getattr(args, "calculate_per_token_loss", False):
        warnings.warn(
            "without --calculate-per-token-loss Megatron averages per micro-batch first, so tokens of short samples "
            "weigh more; the paper's code averages over all tokens of the batch",
            stacklevel=2,
        )
    if args.true_vocab_size is None:
        warnings.warn(
            "without --true-vocab-size (config.vocab_size of the Hugging Face model) the columns that pad the "
            "vocabulary for tensor parallelism count as tokens",
            stacklevel=2,
        )
