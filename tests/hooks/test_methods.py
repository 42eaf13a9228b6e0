"""One row of the table of methods: flag, recipe key, dry run, refusals and documents follow from it."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from pathlib import Path

import pytest
import yaml

from eaft_megatron import methods
from eaft_megatron.hooks import LossSettings, add_eaft_arguments, settings_from_args
from eaft_megatron.hooks.arguments import loss_arguments
from eaft_megatron.hooks.loss_hook import check_own_gate
from eaft_megatron.hooks.resumption import refuse_another_loss
from eaft_megatron.launch.command import build_command
from eaft_megatron.launch.recipe import loss_keys, read_recipe
from eaft_megatron.loss.gates import Gate

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class PowerGate(Gate):
    """``w = p ** exponent``: a method to add, with one parameter."""

    exponent: float = 1.0

    def weight(self, stats, context):
        return stats.probability**self.exponent


@pytest.fixture
def power(monkeypatch) -> None:
    """The row."""
    option = methods.Option(
        "cube_exponent", "--cube-exponent", "exponent", metavar="Q", default=1.0, argument="exponent"
    )
    monkeypatch.setitem(methods.METHODS, "cube", methods.Method(PowerGate, "`p ** q`", (option,), "ours"))


def _parse(*flags: str) -> argparse.Namespace:
    return add_eaft_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(flags)


def _recipe(folder: Path, **loss) -> Path:
    values = {"name": "a", "entrypoint": "train", "model": {"hf": "x"}, "loss": loss,
              "parallel": {"processes_per_node": 1}, "optimization": {"train_iters": 3}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def test_a_method_with_a_parameter_is_one_class_and_one_row(power, tmp_path):
    """Flag, settings, recipe key, dry run, resumption and the table, with nothing else changed."""
    settings = settings_from_args(_parse("--loss-type", "cube", "--cube-exponent", "3"))
    assert settings == LossSettings("cube", cube_exponent=3.0) and settings.gate() == PowerGate(3.0)
    assert settings_from_args(_parse("--loss-type", "cube")).gate() == PowerGate()
    assert pickle.loads(pickle.dumps(settings)) == settings
    argv = build_command(read_recipe(_recipe(tmp_path, type="cube"), ["loss.cube_exponent=2"])).argv
    assert " ".join(argv).endswith("--loss-type cube --cube-exponent 2.0")
    assert "cube_exponent" in loss_arguments()
    assert "| `cube` (ours) | `p ** q` | `--cube-exponent` | |" in methods.markdown_table()


def test_its_parameter_is_refused_with_another_method(power, tmp_path):
    """By flag, by keyword and in a recipe: the flag is named, and the way out."""
    message = "--cube-exponent is for --loss-type cube, not eaft: remove it"
    with pytest.raises(ValueError, match=message):
        settings_from_args(_parse("--loss-type", "eaft", "--cube-exponent", "3"))
    with pytest.raises(ValueError, match=message):
        LossSettings("eaft", cube_exponent=3.0)
    with pytest.raises(ValueError, match=message):
        build_command(read_recipe(_recipe(tmp_path, type="eaft", cube_exponent=3)))
    with pytest.raises(ValueError, match="unknown key loss.cube_exponents: did you mean loss.cube_exponent"):
        read_recipe(_recipe(tmp_path, type="cube", cube_exponents=3))


def test_a_row_cannot_take_anothers_flag(monkeypatch):
    """Two options of one flag are an error, not a surprise."""
    option = methods.Option("other", "--talr-tau", "another temperature")
    monkeypatch.setitem(methods.METHODS, "other", methods.Method(PowerGate, "", (option,)))
    with pytest.raises(ValueError, match="--talr-tau .* another option"):
        LossSettings()


def test_recipes_know_every_loss_flag(tmp_path):
    """All but the true vocabulary, which follows from the model; a switch has no value."""
    given = {"type": "eaft", "linear_chunk": 4096, "linear_drop_ignored": True, "alpha": 2, "topk": 10}
    argv = " ".join(build_command(read_recipe(_recipe(tmp_path, **given))).argv)
    for flags in ("--eaft-linear-chunk 4096", "--eaft-linear-drop-ignored --eaft-topk 10", "--eaft-alpha 2.0"):
        assert flags in argv
    flags = set(add_eaft_arguments(argparse.ArgumentParser(add_help=False))._option_string_actions)
    assert {option.flag for option in loss_keys().values()} == {
        flag for flag in flags if not flag.startswith(("--sft-", "--save-")) or flag == "--sft-kl-beta"
    } - {"--true-vocab-size"}


def test_the_documents_are_the_table():
    """README's methods, and the keys in the recipes' README."""
    assert methods.markdown_table() in (ROOT / "README.md").read_text()
    keys = ", ".join(f"`{key}`" for key in loss_keys()).replace("`type`", "`type` (eaft)")
    assert f"| `loss` | {keys} |" in (ROOT / "examples/recipes/README.md").read_text()


def test_settings_can_be_replaced_and_refuse_unknown_names():
    settings = dataclasses.replace(LossSettings("talr", talr_tau=2.0), true_vocab_size=90)
    assert settings == LossSettings("talr", talr_tau=2.0, true_vocab_size=90) and settings.talr_min_weight == 0.01
    with pytest.raises(TypeError, match="LossSettings has no tau; options .* talr_tau"):
        LossSettings("talr", tau=2.0)


def test_a_gate_of_ones_own_must_be_one():
    """Not a function, not beside another method's options, and able to work with this K."""
    with pytest.raises(ValueError, match="instance of .*Gate"):
        check_own_gate(lambda stats: stats, LossSettings())
    with pytest.raises(ValueError, match="options of a method"):
        check_own_gate(PowerGate(), LossSettings(alpha=2.0))


def test_a_resumed_run_must_have_the_same_gate():
    """Its repr is in the checkpoint's arguments."""
    args, other = _parse(), _parse()
    args.eaft_own_gate, other.eaft_own_gate = repr(PowerGate(2.0)), repr(PowerGate(3.0))
    refuse_another_loss(args, args)
    for before, now in ((args, other), (args, _parse()), (_parse(), args)):
        with pytest.raises(ValueError, match="PowerGate.*--finetune"):
            refuse_another_loss(before, now)
