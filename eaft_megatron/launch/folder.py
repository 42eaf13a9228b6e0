"""The run folder: all that is needed to know what ran, and to run it again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
from pathlib import Path

from eaft_megatron.files import write_text
from eaft_megatron.installed import versions
from eaft_megatron.launch.command import Command, run_folder
from eaft_megatron.launch.recipe import Recipe, read_recipe, to_dict
from eaft_megatron.launch.script import SNAPSHOTS, TEMPLATES, recipe_text, render, shell_line, snapshot_name

RECIPE = "recipe.yaml"
SCRIPT = "sft.sbatch"
LOCAL_SCRIPT = "local.sh"


def resolved(recipe: Recipe) -> Recipe:
    """The same with every path absolute, and the Megatron-LM checkout written down."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute())

    def absolute_if_given(path: str | None) -> str | None:
        return absolute(path) if path else path

    model = dataclasses.replace(
        recipe.model, checkpoint=absolute_if_given(recipe.model.checkpoint), hf=absolute_if_given(recipe.model.hf)
    )
    data = dataclasses.replace(
        recipe.data,
        sft_data=absolute_if_given(recipe.data.sft_data),
        jsonl=absolute_if_given(recipe.data.jsonl),
        eval={name: absolute(folder) for name, folder in recipe.data.eval.items()},
    )
    megatron_lm = recipe.megatron_lm or os.environ.get("MEGATRON_LM_PATH")
    if recipe.entrypoint == "train":
        megatron_lm = None
    return dataclasses.replace(
        recipe, model=model, data=data, run_dir=absolute(recipe.run_dir), megatron_lm=absolute_if_given(megatron_lm)
    )


def write_run_folder(recipe: Recipe, command: Command) -> Path:
    """Write recipe, script, command, versions and environment; returns the folder.

    The folder of a run that was launched before is taken again if its recipe is the same, so that it goes on.

    Raises:
        ValueError: something the run needs is not there, or the folder belongs to another recipe.
    """
    if command.missing:
        raise ValueError("\n  ".join(["not launched; what is missing:", *command.missing]))
    folder = run_folder(recipe)
    if (folder / RECIPE).exists():
        _refuse_another(read_recipe(folder / RECIPE), recipe, folder)
    for name in ("logs", SNAPSHOTS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    files = {
        RECIPE: recipe_text(recipe),
        snapshot_name(recipe): recipe_text(recipe),
        SCRIPT: render(recipe, command),
        LOCAL_SCRIPT: (TEMPLATES / LOCAL_SCRIPT).read_text(encoding="utf-8"),
        "command.txt": shell_line(command.argv) + "\n",
        "versions.txt": "\n".join(_versions(recipe)) + "\n",
        "environment.txt": "\n".join(_environment()) + "\n",
    }
    secret = (RECIPE, SCRIPT, snapshot_name(recipe)) if recipe.environment else ()  # it may hold a token
    for name, text in files.items():
        mode = 0o755 if name in (SCRIPT, LOCAL_SCRIPT) else 0o644
        write_text(folder / name, text, mode=mode & 0o700 if name in secret else mode)
    return folder


def _refuse_another(before: Recipe, now: Recipe, folder: Path) -> None:
    old, new = _flat(to_dict(before)), _flat(to_dict(now))
    for key in sorted(old.keys() | new.keys()):
        # Where and how long a job runs may change from one launch to the next; what is trained may not.
        if not key.startswith(("slurm.", "parallel.nodes", "python", "environment.")) and old.get(key) != new.get(key):
            raise ValueError(
                f"{folder} is the run of another recipe ({key} was {old.get(key)!r}, now {new.get(key)!r}): give this "
                "one another name"
            )


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _versions(recipe: Recipe) -> list[str]:
    lines = versions()
    for name, path in (
        ("eaft_megatron", Path(__file__).parents[2]),
        ("Megatron-LM", recipe.megatron_lm),
    ):
        if path:
            lines.append(f"{name} commit {_commit(Path(path))}")
    return lines


def _commit(path: Path) -> str:
    """The commit of a checkout, and whether it was changed since."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(path), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    except FileNotFoundError:
        return "unknown (no git here)"
    if not commit or not top or Path(top).resolve() != path.resolve():
        return "unknown (not a checkout)"
    return commit + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _environment() -> list[str]:
    """name==version of everything installed where `launch` runs."""
    packages = {(item.metadata["Name"] or "?", item.version) for item in importlib.metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(packages, key=lambda pair: pair[0].lower())]
