"""``eaft-megatron info``: versions, for a bug report."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print a line for each package and device."""
    from eaft_megatron.installed import versions

    print("\n".join(versions()))
    return 0
