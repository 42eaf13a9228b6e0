"""Which of the two implementations of the passes over the logits is used."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

MAX_KERNEL_TOPK = 128
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_triton(impl: str, logits: Tensor, topk: int) -> bool:
    """Whether the Triton kernels compute this loss; the plain torch passes do otherwise.

    "auto" takes the kernels for bf16, fp16 and fp32 logits on an NVIDIA GPU of compute capability 8.0 or later when
    Triton can be imported and K is at most 128, and is silent where it cannot. With TRITON_INTERPRET=1 in the
    environment "triton" also accepts CPU tensors (slowly: for tests).

    Raises:
        ValueError: an unknown ``impl``, or "triton" where the kernels cannot run; the message says why.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    if impl == "torch" or (impl == "auto" and logits.device.type != "cuda"):
        return False
    obstacle = _obstacle(logits, topk)
    if impl == "triton" and obstacle is not None:
        raise ValueError(f"impl='triton': {obstacle}. Use impl='auto' or impl='torch'")
    return obstacle is None


def _obstacle(logits: Tensor, topk: int) -> str | None:
    """Why the kernels cannot take these logits; None if they can."""
    if logits.dtype not in _KERNEL_DTYPES:
        return f"the kernels take bfloat16, float16 and float32 logits, got {logits.dtype}"
    if topk > MAX_KERNEL_TOPK:
        return f"the kernels take topk (--eaft-topk) up to {MAX_KERNEL_TOPK}, got {topk}"
    if not _triton_works():
        return "Triton cannot be imported (pip install 'eaft_megatron[gpu]')"
    if logits.device.type == "cuda":
        return _device_obstacle(logits.device.index)
    if logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the kernels run on an NVIDIA GPU (on the CPU with TRITON_INTERPRET=1), got logits on {logits.device}"


@functools.cache
def _device_obstacle(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels have not been tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _triton_works() -> bool:
    """Looked up once per process. An installation that is there and broken is worth one warning, a missing one none."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import eaft_megatron.loss.triton_impl  # noqa: F401
    except Exception as error:
        warnings.warn(f"Triton is installed but cannot be used, the loss runs in plain torch: {error}", stacklevel=2)
        return False
    return True
