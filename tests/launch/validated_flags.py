"""Megatron-LM's own parser and validation, on the flags of recipes: what became of every value that was given."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

_COMPUTED = {"world_size", "rank", "data_parallel_size"}


def main() -> None:
    """Reads jobs [name, world size, data-parallel size, flags] from standard input; a line for each."""
    import torch
    from megatron.training import arguments

    from eaft_megatron.hooks import add_eaft_arguments

    # The checks ask which GPU this is: an H100.
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)
    for name, world, data_parallel, flags in json.load(sys.stdin):
        os.environ.update(WORLD_SIZE=str(world), RANK="1")
        sys.argv = ["pretrain_gpt.py"]
        defaults = vars(arguments.parse_args(extra_args_provider=add_eaft_arguments))
        sys.argv += flags
        args = arguments.parse_args(extra_args_provider=add_eaft_arguments)
        given = {key: value for key, value in vars(args).items() if value != defaults[key] and key not in _COMPUTED}
        arguments.validate_args(args)
        assert args.data_parallel_size == data_parallel and args.loss_type == "eaft" and args.sft
        changed = [
            f"{key} {value} -> {getattr(args, key)}" for key, value in given.items() if getattr(args, key) != value
        ]
        print(f"changed {name}: {', '.join(changed)}" if changed else f"kept {name}")
