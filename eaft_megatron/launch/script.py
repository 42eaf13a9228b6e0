"""The batch script of one run: the generic sft.sbatch with its options, settings and command filled in."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from pathlib import Path

from eaft_megatron.launch.command import PLACEHOLDER, Command, run_folder
from eaft_megatron.launch.recipe import Recipe, to_dict

TEMPLATES = Path(__file__).parent / "templates"
SNAPSHOTS = "recipes"


def render(recipe: Recipe, command: Command) -> str:
    """The script that `sbatch` takes. It needs nothing but the run folder's disk and what the recipe names."""
    text = (TEMPLATES / "sft.sbatch").read_text(encoding="utf-8")
    text = _fill(text, "options", [f"#SBATCH {option}" for option in sbatch_options(recipe)])
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings(recipe, command).items()]
    return _fill(text, "settings", [*exports, f"set -- {_one_flag_a_line(command.argv)}"])


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    import yaml

    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def snapshot_name(recipe: Recipe) -> str:
    """Where in the run folder a job finds its very recipe, whatever is launched there later."""
    return f"{SNAPSHOTS}/{hashlib.sha256(recipe_text(recipe).encode()).hexdigest()[:12]}.yaml"


def shell_line(argv: list[str]) -> str:
    """The command as one would type it, a flag a line."""
    return f"torchrun {_one_flag_a_line(argv)}"


def sbatch_options(recipe: Recipe) -> list[str]:
    """What stands behind #SBATCH, with what the generic script always asks for."""
    slurm, layout = recipe.slurm, recipe.parallel
    if not re.fullmatch(r"[\w.+-]+", recipe.name):
        raise ValueError(f"name: {recipe.name!r} names a job and a folder: letters, digits, and _ . + - only")
    gpus = layout.processes_per_node if slurm.gpus_per_node is None else slurm.gpus_per_node
    options = [
        f"--job-name={recipe.name}",
        f"--nodes={layout.nodes}",
        "--ntasks-per-node=1",
        f"--time={slurm.time}",
        f"--output={shlex.quote(f'{run_folder(recipe)}/logs/%j.out')}",
        f"--signal=B:USR1@{slurm.save_seconds}",
        "--requeue" if slurm.requeue else "--no-requeue",
        "--open-mode=append",
    ]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += ["--exclusive"] if slurm.exclusive else []
    options += ["--dependency=singleton"] if slurm.singleton else []
    for name in ("partition", "account", "qos", "exclude"):
        if value := getattr(slurm, name):
            options.append(f"--{name}={value}")
    return [*options, *slurm.options]


def settings(recipe: Recipe, command: Command) -> dict[str, str]:
    """The EAFT_* variables of sft.sbatch and local.sh, and the recipe's own environment."""
    slurm, folder = recipe.slurm, run_folder(recipe)
    values = {
        "EAFT_RUN_DIR": str(folder),
        "EAFT_PYTHON": recipe.python or ("python" if slurm.container != "none" else sys.executable),
        "EAFT_PROCESSES": str(recipe.parallel.processes_per_node),
        "EAFT_TRAIN_ITERS": PLACEHOLDER if command.train_iters is None else str(command.train_iters),
        "EAFT_REQUEUE": str(int(slurm.requeue)),
        "EAFT_MAX_RESTARTS": str(slurm.max_restarts),
        "EAFT_RECIPE": str(folder / snapshot_name(recipe)),
        "EAFT_PREFLIGHT": str(int(slurm.preflight)),
        "EAFT_RENDEZVOUS": slurm.rendezvous,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(slurm.save_seconds),
    }
    if slurm.setup:
        values["EAFT_SETUP"] = str(Path(slurm.setup).absolute())
    if slurm.container != "none":
        if not slurm.image:
            raise ValueError(f"slurm.container: {slurm.container} needs slurm.image")
        values |= {"EAFT_CONTAINER": slurm.container, "EAFT_CONTAINER_IMAGE": slurm.image}
        values["EAFT_CONTAINER_MOUNTS"] = slurm.mounts or ",".join(_named_folders(recipe))
    if slurm.srun_options:
        if broken := [option for option in slurm.srun_options if not option or len(option.split()) != 1]:
            raise ValueError(f"slurm.srun_options: {broken[0]!r} holds a blank: one word each, as --NAME=VALUE")
        values["EAFT_SRUN_OPTIONS"] = " ".join(slurm.srun_options)
    return values | recipe.environment


def _named_folders(recipe: Recipe) -> list[str]:
    """What a container must see: the runs, and each folder or file that the recipe names; none within another."""
    paths = [recipe.megatron_lm, recipe.model.checkpoint, recipe.model.hf, recipe.data.sft_data, recipe.data.jsonl]
    paths += [*recipe.data.eval.values(), recipe.slurm.setup]
    folders = {run_folder(recipe).parent, *(Path(path).absolute() for path in paths if path)}
    return [str(path) for path in sorted(folders) if not any(other in path.parents for other in folders)]


def _one_flag_a_line(argv: list[str]) -> str:
    """Shell words, broken before each flag."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines)


def _fill(text: str, mark: str, lines: list[str]) -> str:
    """The text with the lines between the marks replaced."""
    body = "\n".join(lines)
    filled, count = re.subn(
        rf"(?ms)^# >>> {mark}\n.*?^# <<< {mark}$", lambda match: f"# >>> {mark}\n{body}\n# <<< {mark}", text
    )
    assert count == 1, f"sft.sbatch has no place for the {mark}"
    return filled
