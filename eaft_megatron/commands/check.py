"""``eaft-megatron check``: under torchrun on the nodes of the job, before it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to check."""
    parser.add_argument("target", metavar="RUN_DIR|RECIPE", help="a run folder that `launch` wrote, or a recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--min-bandwidth", type=float, default=0.0, metavar="GB/S", help="fail below this all-reduce bus bandwidth"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a check failed."""
    from eaft_megatron.launch.folder import RECIPE
    from eaft_megatron.launch.preflight import main
    from eaft_megatron.launch.recipe import read_recipe

    target = Path(args.target)
    return main(read_recipe(target / RECIPE if target.is_dir() else target, args.overrides), args)
