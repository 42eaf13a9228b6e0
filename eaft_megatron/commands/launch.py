"""``eaft-megatron launch``: from a recipe to a Slurm job, or to a run on this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, what differs from it, and where to run it."""
    parser.add_argument("recipe", help="a YAML file such as those in examples/recipes, or a run folder's recipe.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="section.key=value; repeatable",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="the same as --set parallel.nodes=N")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="submit N jobs, one after the other")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dry-run", action="store_true", help="print script and command, write and submit nothing")
    where.add_argument("--local", action="store_true", help="run it on this machine, now")


def run(args: argparse.Namespace) -> int:
    """Show, run or submit."""
    from eaft_megatron.launch.command import build_command
    from eaft_megatron.launch.folder import LOCAL_SCRIPT, SCRIPT, resolved, write_run_folder
    from eaft_megatron.launch.recipe import read_recipe
    from eaft_megatron.launch.script import render, settings, shell_line

    overrides = [*args.overrides, *([f"parallel.nodes={args.nodes}"] if args.nodes is not None else [])]
    if args.chain < 1:
        raise ValueError(f"--chain must be >= 1, got {args.chain}")
    recipe = resolved(read_recipe(args.recipe, [*overrides, "parallel.nodes=1"] if args.local else overrides))
    if args.chain > 1 and not recipe.slurm.singleton:
        raise ValueError("--chain needs slurm.singleton: true, or the jobs would run at the same time")
    command = build_command(recipe)
    if args.dry_run:
        print(render(recipe, command))
        print(f"# ---- what every node runs ----\n{shell_line(command.argv)}")
        for line in command.missing:
            print(f"missing: {line}", file=sys.stderr)
        return 0
    if not args.local and shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here: log in where Slurm is, or run it on this machine with --local")
    folder = write_run_folder(recipe, command)
    print(f"run folder: {folder}", flush=True)
    if args.local:
        environment = {**os.environ, **settings(recipe, command)}
        return subprocess.run([str(folder / LOCAL_SCRIPT), *command.argv], env=environment).returncode
    for _ in range(args.chain):
        done = subprocess.run(
            ["sbatch", "--parsable", str(folder / SCRIPT)], env=_submission(), capture_output=True, text=True
        )
        if done.returncode != 0:
            raise ValueError(f"sbatch {folder / SCRIPT}: {done.stderr.strip()}")
        print(f"job {done.stdout.strip()}: log in {folder}/logs/{done.stdout.strip().split(';')[0]}.out")
    return 0


def _submission() -> dict[str, str]:
    """The environment without what Slurm's own variables would change: those of a job that this shell is part of."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("SBATCH_", "SLURM_", "SLURMD_", "SRUN_"))
    }
