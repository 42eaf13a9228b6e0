"""``eaft-megatron report``: a run's curves."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs and the picture."""
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="a run folder; several are drawn together")
    parser.add_argument("--output", metavar="PNG", help="the picture (default: report.png in the first run folder)")


def run(args: argparse.Namespace) -> int:
    """Draw the picture and print the table."""
    from eaft_megatron.launch.curves import draw, read_run, table

    runs = [read_run(folder) for folder in args.run_dir]
    path = Path(args.output or Path(args.run_dir[0]) / "report.png")
    print(table(runs))
    draw(runs, path)
    print(f"picture: {path}")
    return 0
