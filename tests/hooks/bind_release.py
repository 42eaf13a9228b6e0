"""Our hooks on one Megatron-LM release's own modules, in a process of its own in the folder of its files."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

import eaft_megatron.hooks


def bind() -> None:
    """Flags parse, the hook binds, uninstalling puts everything back."""
    import typing

    if not hasattr(typing, "override"):  # Python 3.11 under Megatron-LM 0.18 and later
        typing.override = lambda method: method
    sys.argv = ["pretrain_gpt.py", "--loss-type", "eaft", "--eaft-topk", "10", "--true-vocab-size", "90"]
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            from eaft_megatron.testing.cpu_script import script_standins

            stack.enter_context(script_standins())
        _check_flags()
        _check_hook(_check_attach())


def _check_flags() -> None:
    """``rebind_megatron`` gives the parser our flags, and what they hold pickles without our classes."""
    import megatron.core
    from megatron.training import arguments, training

    from eaft_megatron.hooks.arguments import loss_arguments

    for module in (megatron.core, training):
        assert Path(module.__file__).is_relative_to(Path.cwd()), f"{module.__file__} is another Megatron-LM"
    originals = arguments.add_megatron_arguments, arguments.validate_args, training.pretrain
    eaft_megatron.hooks.rebind_megatron()
    wrappers = arguments.add_megatron_arguments, arguments.validate_args, training.pretrain
    assert tuple(wrapper.__wrapped__ for wrapper in wrappers) == originals
    args = arguments.parse_args()
    assert (args.loss_type, args.eaft_topk, args.true_vocab_size) == ("eaft", 10, 90)
    values = [getattr(args, name) for name in loss_arguments()]
    assert {type(value) for value in values} <= {str, int, float, type(None)}, values


def _check_attach() -> list[tuple[object, str]]:
    """``attach`` with the flags installs the hook and watches the training loop; returns what it replaced."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import GPTModel
    from megatron.training import arguments, training

    noted = "_postprocess" if hasattr(GPTModel, "_postprocess") else "forward"
    places = [
        *((LanguageModule, "compute_language_model_loss"), (GPTModel, noted)),
        *((training, "train_step"), (training, "evaluate"), (training, "evaluate_and_print_results")),
    ]
    originals = [vars(owner)[name] for owner, name in places]

    def forward_step(data_iterator, model): ...

    assert eaft_megatron.hooks.attach(arguments.parse_args(), forward_step).__wrapped__ is forward_step
    hook = eaft_megatron.hooks.installed()
    assert (hook.settings.loss_type, hook.settings.topk, hook.settings.true_vocab_size) == ("eaft", 10, 90)
    assert [vars(owner)[name].__wrapped__ for owner, name in places] == originals
    eaft_megatron.hooks.uninstall()
    assert [vars(owner)[name] for owner, name in places] == originals
    return places[:2]


def _check_hook(places: list[tuple[object, str]]) -> None:
    """``install`` by itself, and away again."""
    originals = [vars(owner)[name] for owner, name in places]
    eaft_megatron.hooks.install(eaft_megatron.hooks.LossSettings("dft"))
    assert [vars(owner)[name].__wrapped__ for owner, name in places] == originals
    eaft_megatron.hooks.uninstall()
    assert [vars(owner)[name] for owner, name in places] == originals


if __name__ == "__main__":
    bind()
