"""What is installed beside this package. Nothing is imported to find out but torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

from eaft_megatron._version import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "datasets", "safetensors")


def choose_transformer_impl(choice: str) -> str:
    """\"auto\" as "transformer_engine" where Transformer Engine is installed, else as "local"; others as they are."""
    if choice != "auto":
        return choice
    return "transformer_engine" if importlib.util.find_spec("transformer_engine") else "local"


def versions() -> list[str]:
    """A line each for this package, Python, what it works with, and the devices."""
    lines = [f"eaft_megatron {__version__}", f"python {sys.version.split()[0]}"]
    lines += [f"{name} {version_of(name) or 'not installed'}" for name in _PACKAGES]
    return [*lines, f"apex {apex()}", *_devices()]


def version_of(package: str) -> str | None:
    """Of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def apex() -> str:
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
