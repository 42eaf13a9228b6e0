"""examples/recipes: what they say of the models, that they launch, and that Megatron-LM understands their flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eaft_megatron.launch.command import build_command
from eaft_megatron.launch.recipe import read_recipe
from eaft_megatron.launch.script import render

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
CLONE = os.environ.get("MEGATRON_LM_PATH")
TAG = os.environ.get("MEGATRON_LM_NEWEST_TAG", "core_v0.19.0")

PARAMETERS = {  # billions, as the model cards say; with the embeddings
    "qwen2.5-7b-instruct": 7.61,
    "qwen2.5-14b-instruct": 14.7,
    "qwen2.5-32b-instruct": 32.5,
    "qwen3-4b-instruct-2507": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "glm-4-9b-0414": 9.4,
    "glm-4-32b-0414": 32.6,
}


def _recipe(name: str, *overrides: str):
    return read_recipe(ROOT / "examples" / "recipes" / f"{name}.yaml", list(overrides))


def test_every_model_of_the_issue_has_a_recipe():
    assert sorted(path.stem for path in RECIPES) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_config_has_the_parameters_of_the_model_card(name):
    """transformers counts the parameters of the config.json in the recipe, on no device."""
    transformers = pytest.importorskip("transformers")
    import torch

    config = dict(_recipe(name).model.config)
    model_class = getattr(transformers, config.pop("architectures")[0])
    theta = config.pop("rope_theta")
    with torch.device("meta"):
        model = model_class(
            model_class.config_class(**config, rope_parameters={"rope_type": "default", "rope_theta": theta})
        )
    actual = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert actual == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_hyperparameters(name):
    """lr 1e-5, cosine, warmup ratio 0.03, batch 64, 10 epochs, 16384 tokens, AdamW, EAFT with K = 20, token mean."""
    recipe = _recipe(name, "optimization.train_iters=100", "model.checkpoint=nowhere")
    assert (recipe.optimization.epochs, recipe.loss["type"]) == (10, "eaft")
    text = " ".join(build_command(recipe).argv)
    for flags in (
        "--lr 1e-05 --min-lr 0.0 --lr-decay-style cosine --lr-warmup-fraction 0.03",
        "--global-batch-size 64",
        "--seq-length 16384",
        "--optimizer adam",
        "--calculate-per-token-loss",
        "--loss-type eaft --eaft-topk 20",
        f"--true-vocab-size {recipe.model.config['vocab_size']}",
    ):
        assert flags in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path, capsys, monkeypatch, tmp_path):
    """Exit code 0 with nothing there: the whole script, the whole command, marked placeholders, what is missing."""
    from eaft_megatron.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    assert main(["launch", str(path), "--nodes", "4", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert (
        "#SBATCH --nodes=4" in printed.out and "\ntorchrun -m eaft_megatron.run UNKNOWN/pretrain_gpt.py" in printed.out
    )
    assert printed.out.count("--train-iters UNKNOWN") == 2
    for key in ("data.sft_data", "model.checkpoint", "megatron_lm"):
        assert f"missing: {key}" in printed.err
    assert list(tmp_path.iterdir()) == []


# Beside the interpreter, for nobody need activate the environment; not resolved: its python may be a link.
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck(tmp_path):
    """The scripts as they stand, and the script of every recipe."""
    scripts = [
        ROOT / "launch" / "slurm" / "sft.sbatch",
        ROOT / "launch" / "local.sh",
        ROOT / "tests" / "slurm" / "run.sh",
    ]
    for path in RECIPES:
        recipe = read_recipe(path)
        scripts.append(tmp_path / f"{path.stem}.sh")
        scripts[-1].write_text(render(recipe, build_command(recipe)))
    done = subprocess.run([SHELLCHECK, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
