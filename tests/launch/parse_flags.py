"""Megatron-LM's own parser on the flags of recipes, in a process of its own, Megatron-LM below the working directory.

Standard input: a JSON list of [name, world size, data-parallel size, flags].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


def parse() -> None:
    """A line "parsed <name>" for each."""
    import megatron.training
    import torch
    from megatron.training import arguments

    from eaft_megatron.hooks import add_eaft_arguments

    # The checks ask which GPU this is: an H100.
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)
    assert Path(megatron.training.__file__).is_relative_to(Path.cwd())
    for name, world, data_parallel, flags in json.load(sys.stdin):
        os.environ.update(WORLD_SIZE=str(world), RANK="1")
        sys.argv = ["pretrain_gpt.py", *flags]
        args = arguments.parse_args(extra_args_provider=add_eaft_arguments)
        arguments.validate_args(args)
        assert args.data_parallel_size == data_parallel and args.loss_type == "eaft" and args.sft
        print("parsed", name)


if __name__ == "__main__":
    parse()
