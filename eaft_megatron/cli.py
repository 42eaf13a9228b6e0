"""``eaft-megatron VERB ...``: the command line."""

from __future__ import annotations

import argparse
import importlib
import sys

from eaft_megatron._version import __version__

VERBS = {  # verb: what it does; its module is eaft_megatron.commands.<verb>
    "info": "versions of this package and of what it works with, for a bug report",
    "convert": "Hugging Face folder <-> Megatron-LM checkpoint, for any TP x PP",
    "prepare": "conversations into tokenized, masked and packed samples",
    "inspect": "a prepared folder: its samples with the trained tokens coloured, and histograms",
    "score": "a frozen model's log-probability and entropy of each token, beside the prepared data",
    "landscape": "what the scores show: entropy against probability, conflicting tokens, as PNG, JSON and HTML",
    "launch": "a recipe as a Slurm job, or as a run on this machine",
    "check": "under srun or torchrun, before the real thing: nodes, network, disks, checkpoint, data, loss",
    "report": "a run's curves as one picture and a short table",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors a user can mend come without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="eaft-megatron", description=__doc__)
    parser.add_argument("--version", action="version", version=f"eaft_megatron {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    modules = {}
    for verb, text in VERBS.items():
        subparser = verbs.add_parser(verb, help=text, description=text)
        if verb in argv:
            modules[verb] = importlib.import_module(f"eaft_megatron.commands.{verb.replace('-', '_')}")
            modules[verb].add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return modules[args.verb].run(args)
    except (ValueError, OSError) as error:
        print(f"eaft-megatron {args.verb}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
