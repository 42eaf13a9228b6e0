"""Start of a Megatron-LM run: what is bound, what is refused. In one process, on small_megatron/."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eaft_megatron.hooks import LossHook, LossSettings, attach, install, installed, rebind_megatron, uninstall
from eaft_megatron.hooks.metrics import METRICS

SMALL = str(Path(__file__).parent / "small_megatron")


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["megatron", "training"]]:
        del sys.modules[name]
    if hasattr(sys.modules.get("megatron"), "training"):
        del sys.modules["megatron"].training


@pytest.fixture
def megatron(monkeypatch):
    """Fresh modules of the small Megatron-LM, and no hook before or after."""
    monkeypatch.syspath_prepend(SMALL)
    _forget()
    names = ("arguments", "initialize", "training")
    yield SimpleNamespace(**{name: importlib.import_module(f"megatron.training.{name}") for name in names})
    uninstall()
    _forget()


def _start(megatron, monkeypatch, *flags: str):
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    rebind_megatron()
    return megatron.initialize.validate_args(megatron.arguments.parse_args())


def test_flags_become_a_hook(megatron, monkeypatch):
    """Parsed values are plain, and the hook is in force before any model is built."""
    args = _start(megatron, monkeypatch, "--loss-type", "eaft", "--eaft-topk", "10", "--true-vocab-size", "90")
    assert installed().settings == LossSettings("eaft", topk=10, true_vocab_size=90)
    ours = {name: value for name, value in vars(args).items() if name.startswith(("eaft", "loss_t", "talr", "sft_kl"))}
    assert len(ours) >= 9 and all(type(value) in (str, int, float, bool, type(None)) for value in ours.values())


def test_the_vocabulary_is_that_of_the_checkpoint(megatron, monkeypatch, tmp_path):
    """Recorded by the converter: taken where the flag is left out, compared where it is given."""
    (tmp_path / "eaft_model.json").write_text('{"true_vocab_size": 90}')
    flags = ("--loss-type", "eaft", "--load", str(tmp_path))
    with pytest.raises(ValueError, match="--true-vocab-size 91, but .*eaft_model.json says 90"):
        _start(megatron, monkeypatch, *flags, "--true-vocab-size", "91")
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    args = megatron.initialize.validate_args(megatron.arguments.parse_args())
    assert installed().settings.true_vocab_size == args.true_vocab_size == 90


@pytest.mark.parametrize("loss_type", ["eaft", "sft"])
def test_what_was_recorded_goes_along_to_the_save_folder(megatron, monkeypatch, tmp_path, loss_type):
    """So that a resumed run and the conversion back find it; what lies there already is left alone."""
    load, save = tmp_path / "converted", tmp_path / "run"
    (load / "hf").mkdir(parents=True)
    (load / "hf" / "config.json").write_text("{}")
    (load / "eaft_model.json").write_text('{"true_vocab_size": 90}')
    flags = ("--loss-type", loss_type, "--load", str(load), "--save", str(save))
    _start(megatron, monkeypatch, *flags)
    assert (save / "hf" / "config.json").read_text() == "{}"
    assert (save / "eaft_model.json").read_text() == '{"true_vocab_size": 90}'
    (save / "eaft_model.json").write_text('{"true_vocab_size": 91}')
    uninstall()
    attach(megatron.arguments.parse_args())
    assert (save / "eaft_model.json").read_text() == '{"true_vocab_size": 91}'
    assert sorted(path.name for path in save.iterdir()) == ["eaft_model.json", "hf"]


def test_sft_installs_nothing(megatron, monkeypatch):
    """Not a single function of the training loop or of megatron-core is another."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    before = (LanguageModule.compute_language_model_loss, megatron.training.train_step, megatron.training.evaluate)
    _start(megatron, monkeypatch, "--loss-type", "sft")
    after = (LanguageModule.compute_language_model_loss, megatron.training.train_step, megatron.training.evaluate)
    assert installed() is None and after == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--eaft-linear-chunk", "64", "--use-torch-fsdp2"), "--eaft-linear-chunk cannot serve --use-torch-fsdp2"),
        (("--use-legacy-models",), "--use-legacy-models computes its loss outside megatron-core"),
        (("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"), "--cross-entropy-loss-fusion with"),
        (("--export-kd-teacher-load", "x"), "--export-kd-teacher-load"),
        (("--logits-load-dir", "x"), "--logits-load-dir"),
        (("--logits-save-dir", "x"), "--logits-save-dir"),
        (("--cuda-graph-impl", "full_iteration"), "CUDA graphs of whole iterations"),
        (("--cuda-graph-impl", "local", "--cuda-graph-scope", "full_iteration"), "CUDA graphs of whole iterations"),
        (("--enable-cuda-graph", "--cuda-graph-scope", "full_iteration"), "CUDA graphs of whole iterations"),
        (("--perform-rl-step",), "--perform-rl-step"),
        (("--no-check-for-nan-in-loss-and-grad",), "--no-check-for-nan-in-loss-and-grad would let NaN"),
        (("--no-check-for-nan-in-loss-and-grad", "--fp16", "--loss-scale", "8"), "--no-check-for-nan"),
        (("--talr-tau", "2"), "--talr-tau is for --loss-type talr, not eaft"),
        (("--eaft-topk", "0"), "--eaft-topk must be >= 1"),
        (("--loss-type", "flow"), "--loss-type flow needs scores of the frozen base model"),
        (("--yaml-cfg", "x"), "--yaml-cfg replaces the parsed flags"),
    ],
)
def test_what_would_bypass_the_loss_is_refused_at_start(megatron, monkeypatch, flags, message):
    """The flag is named, with the way out."""
    with pytest.raises(ValueError, match=message):
        _start(megatron, monkeypatch, "--loss-type", "eaft", *flags)
    assert installed() is None


@pytest.mark.parametrize("flags", [("--cross-entropy-loss-fusion",), ("--fp16",), ("--cuda-graph-impl", "local")])
def test_what_is_harmless_is_let_through(megatron, monkeypatch, flags):
    """The native fusion is simply not called; where Megatron turns its NaN check off itself, ours is on."""
    _start(megatron, monkeypatch, "--loss-type", "eaft", *flags)
    assert installed().check_finite == ("--fp16" in flags)


def test_yaml_without_a_loss_of_ours_is_none_of_our_business(megatron, monkeypatch):
    """The parsed flags are gone, and nothing was asked for."""
    monkeypatch.setattr(sys, "argv", ["pretrain", "--yaml-cfg", "x"])
    rebind_megatron()
    args = megatron.arguments.parse_args()
    assert not hasattr(args, "loss_type") and installed() is None
    with pytest.raises(ValueError, match="--yaml-cfg replaces the parsed flags"):  # a patched checkout comes here
        attach(args)


def test_a_resumed_run_must_keep_its_loss(megatron, monkeypatch):
    """--load without --finetune: the checkpoint's loss flags against this run's, sft included."""
    from megatron.training import checkpointing

    args = _start(megatron, monkeypatch, "--loss-type", "eaft", "--true-vocab-size", "90")
    now = argparse.Namespace(**vars(args))
    importlib.import_module("megatron.training.global_vars").set_args(now)
    checkpointing.check_checkpoint_args(args, skip_args=None)
    checkpointing.check_checkpoint_args(argparse.Namespace(tensor_model_parallel_size=1))  # written without us
    now.true_vocab_size = None
    with pytest.raises(ValueError, match="trained with --true-vocab-size 90, this run has None"):
        checkpointing.check_checkpoint_args(args)
    now.loss_type = "sft"
    with pytest.raises(ValueError, match="trained with --loss-type eaft, this run has sft"):
        checkpointing.check_checkpoint_args(args)


def test_flags_without_effect_on_sft_are_said(megatron, monkeypatch):
    """Both runs of a comparison may carry them."""
    with pytest.warns(UserWarning, match="--true-vocab-size has no effect with --loss-type sft"):
        _start(megatron, monkeypatch, "--true-vocab-size", "90")


def test_linear_chunks_are_not_for_megatrons_own_loss(megatron, monkeypatch):
    with pytest.raises(ValueError, match="--eaft-linear-chunk: --loss-type sft is Megatron's own loss"):
        _start(megatron, monkeypatch, "--eaft-linear-chunk", "4096")


def test_an_override_of_the_loss_method_is_found_at_start(megatron, monkeypatch):
    """A fork's own subclass, before anything is trained."""
    from megatron.core.models.gpt import GPTModel

    overriding = type("Fork", (GPTModel,), {"compute_language_model_loss": lambda self, labels, logits: 0})
    with pytest.raises(ValueError, match="Fork overrides compute_language_model_loss"):
        _start(megatron, monkeypatch, "--loss-type", "eaft")
    del overriding.compute_language_model_loss


def test_a_fork_with_a_flag_of_ours_is_refused(megatron, monkeypatch):
    """Its own add_megatron_arguments defines --eaft-topk."""
    original = megatron.arguments.add_megatron_arguments

    def of_the_fork(parser):
        parser.add_argument("--eaft-topk", type=int)
        return original(parser)

    monkeypatch.setattr(megatron.arguments, "add_megatron_arguments", of_the_fork)
    with pytest.raises(ValueError, match="this script defines --eaft-topk itself"):
        _start(megatron, monkeypatch, "--loss-type", "eaft")


@pytest.mark.parametrize("owner, name", [("arguments", "validate_args"), ("training", "evaluate")])
def test_an_unknown_megatron_is_refused(megatron, monkeypatch, owner, name):
    """What is missing is named."""
    monkeypatch.delattr(getattr(megatron, owner), name)
    with pytest.raises(ValueError, match=f"megatron.training.{owner} of this Megatron-LM has no {name}"):
        rebind_megatron()


def test_a_pretrain_without_forward_step_is_refused(megatron, monkeypatch):
    """Another signature is another version."""
    monkeypatch.setattr(megatron.training, "pretrain", lambda provider, model: None)
    with pytest.raises(ValueError, match="takes no forward_step_func"):
        rebind_megatron()


def test_a_step_without_the_hook_ends_the_run(megatron, monkeypatch):
    """The last stage's first step is over and nobody called the hook: said once, by whoever trains."""
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda **kwargs: True)
    monkeypatch.setattr(megatron.training, "train_step", lambda: "trained")
    _start(megatron, monkeypatch, "--loss-type", "eaft")
    with pytest.raises(RuntimeError, match="the first step is over and the loss hook was never called"):
        megatron.training.train_step()
    uninstall()
    assert megatron.training.train_step() == "trained"


def test_metrics_leave_megatrons_evaluation(megatron, monkeypatch, capsys):
    """Time running out (None) and stages without a report ({}) pass through."""
    reports = iter([dict.fromkeys(METRICS, 2.0), {}, None])
    monkeypatch.setattr(megatron.training, "evaluate", lambda: (next(reports), None, False))
    monkeypatch.setattr(
        megatron.training,
        "evaluate_and_print_results",
        lambda prefix, iteration: [megatron.training.evaluate()[0] for _ in range(3)],
    )
    monkeypatch.setattr(megatron.training, "is_last_rank", lambda: True)
    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace())
    _start(megatron, monkeypatch, "--loss-type", "eaft")
    assert megatron.training.evaluate_and_print_results("the end", 3) == [{"lm loss": 2.0}, {}, None]
    assert "validation at the end | eaft loss: 2.000000E+00 | eaft weight: 2.000000E+00" in capsys.readouterr().out


def test_attach_twice(megatron, monkeypatch):
    """A restart within the process with the same flags keeps the hook; other settings are refused."""
    args = _start(megatron, monkeypatch, "--loss-type", "eaft")
    hook = installed()

    def step(data_iterator, model):
        raise AssertionError("not called here")

    assert attach(args, step).__wrapped__ is step and installed() is hook
    args.eaft_topk = 5
    with pytest.raises(ValueError, match="installed already, with other settings"):
        attach(args)


def test_install_covers_every_causal_language_model():
    """GPTModel, and MambaModel or HybridModel whose batches know the same loss mask."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mamba import MambaModel

    before = (GPTModel._postprocess, MambaModel.forward)
    install(LossSettings())
    assert GPTModel._postprocess.__wrapped__ is before[0] and MambaModel.forward.__wrapped__ is before[1]
    uninstall()
    assert (GPTModel._postprocess, MambaModel.forward) == before


def test_an_output_processor_is_refused():
    """From 0.18 on a caller may take the loss into its own hands; no flag says so, the first call does."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    from eaft_megatron.hooks.loss_hook import _note_arguments

    class Model(LanguageModule):
        def _postprocess(self, hidden_states, labels, loss_mask=None, output_processor=None):
            return "the loss"

    hook, model = LossHook(LossSettings()), Model.__new__(Model)
    _note_arguments(hook, Model, "_postprocess")
    assert model._postprocess(None, None) == "the loss"
    with pytest.raises(ValueError, match="output_processor takes the loss of Model into its own hands"):
        model._postprocess(None, None, output_processor=print)
    hook.remove()
    assert model._postprocess(None, None, output_processor=print) == "the loss"
