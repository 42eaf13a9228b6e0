"""What Megatron-LM's own validation makes of every recipe's flags: nothing that was asked for is turned off."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eaft_megatron.launch.command import build_command, data_parallel_size
from eaft_megatron.launch.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
CLONE = os.environ.get("MEGATRON_LM_PATH")
TAG = os.environ.get("MEGATRON_LM_NEWEST_TAG", "core_v0.19.0")


def _wheel_has_training() -> bool:
    return bool(importlib.util.find_spec("megatron")) and bool(importlib.util.find_spec("megatron.training"))


def _after_validation(tmp_path, jobs: list, environment: dict[str, str]) -> list[str]:
    """What Megatron-LM's own checks made of each job's flags, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.launch.validated_flags import main; main()"],
        env=environment,
        input=json.dumps(jobs),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("kept ", "changed "))]


def _jobs(*overrides: str) -> list:
    jobs = []
    for path in RECIPES:
        recipe = read_recipe(path, ["optimization.train_iters=100", *overrides])
        argv = build_command(recipe).argv
        world = recipe.parallel.nodes * recipe.parallel.processes_per_node
        jobs.append([recipe.name, world, data_parallel_size(recipe), argv[argv.index("-m") + 3 :]])
    return jobs


def _check_recipes(tmp_path, environment: dict[str, str]) -> None:
    expected = [f"kept {path.stem}" for path in RECIPES]
    assert _after_validation(tmp_path, _jobs(), environment) == expected
    assert _after_validation(tmp_path, _jobs("checkpoint.async_save=true"), environment) == expected
    # What the recipes had before: Megatron switches it off, and says so in its log alone.
    (before, *_) = _jobs()
    before[3].append("--async-save")
    assert _after_validation(tmp_path, [before], environment) == [f"changed {before[0]}: async_save True -> False"]


@pytest.mark.skipif(
    not _wheel_has_training(), reason="this megatron-core has no megatron.training (make test-megatron-training)"
)
def test_nothing_asked_for_is_turned_off(tmp_path):
    """The flags of all recipes, after the newest megatron-core's own validation: every value is the one given."""
    _check_recipes(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"})


@pytest.mark.slow
@pytest.mark.skipif(not CLONE, reason="MEGATRON_LM_PATH does not name a clone of NVIDIA/Megatron-LM")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Megatron-LM's training loop imports triton")
def test_nothing_asked_for_is_turned_off_in_a_checkout(tmp_path, monkeypatch):
    """The same with a tag of a clone."""
    from tests.hooks.megatron_script import checkout, environment

    script = checkout(CLONE, TAG, tmp_path)
    monkeypatch.setenv("MEGATRON_LM_PATH", str(script.parent))
    # Ours before Megatron-LM's: both have a package named tests.
    paths = os.pathsep.join([str(ROOT), str(script.parent)])
    _check_recipes(tmp_path, environment(script) | {"PYTHONPATH": paths})
