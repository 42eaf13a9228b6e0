"""``eaft-megatron info``: versions, for a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys

from eaft_megatron._version import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "datasets", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print a line for each package and device."""
    print("\n".join(versions()))
    return 0


def versions() -> list[str]:
    """This package, Python, what it works with, and the devices."""
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
