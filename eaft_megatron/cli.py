"""``eaft-megatron VERB ...``: the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys

from eaft_megatron._version import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "datasets", "safetensors")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors a user can mend come without a traceback."""
    parser = argparse.ArgumentParser(prog="eaft-megatron", description=__doc__)
    parser.add_argument("--version", action="version", version=f"eaft_megatron {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("info", help="versions of this package and of what it works with, for a bug report")
    convert = verbs.add_parser("gguf-to-hf", help="a Llama GGUF file as a (dequantised) Hugging Face folder")
    convert.add_argument("gguf_file")
    convert.add_argument("output_dir")
    args = parser.parse_args(argv)
    try:
        if args.verb == "info":
            print("\n".join(_info()))
        else:
            from eaft_megatron.models.gguf import gguf_to_hf

            gguf_to_hf(args.gguf_file, args.output_dir)
    except (ValueError, OSError) as error:
        print(f"eaft-megatron {args.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def _info() -> list[str]:
    lines = [f"eaft_megatron {__version__}", f"python {sys.version.split()[0]}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return [*lines, f"apex {_apex()}", *_devices()]


def _apex() -> str:
    """NVIDIA's Apex, or the unrelated package that has its name on PyPI."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "is not NVIDIA's Apex but another project of that name from PyPI: uninstall it"
    return "installed (NVIDIA's)"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["no CUDA device"]
    return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]


if __name__ == "__main__":
    sys.exit(main())
