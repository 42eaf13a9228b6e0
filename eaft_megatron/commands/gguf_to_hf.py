"""``eaft-megatron gguf-to-hf``: a Llama GGUF file as a Hugging Face folder."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file and the folder."""
    parser.add_argument("gguf_file")
    parser.add_argument("output_dir")


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    from eaft_megatron.models.gguf import gguf_to_hf

    gguf_to_hf(args.gguf_file, args.output_dir)
    return 0
