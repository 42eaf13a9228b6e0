"""Scratch memory that shows when nobody wrote to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_UNINITIALISED = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_permuted,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}


def poison_value(dtype: torch.dtype) -> complex | float | int | bool:
    """NaN for floating and complex types, the lowest value of a signed integer, the highest of an unsigned one."""
    if dtype.is_complex:
        return complex(float("nan"), float("nan"))
    if dtype.is_floating_point:
        return float("nan")
    if dtype is torch.bool:
        return True
    info = torch.iinfo(dtype)
    return info.min if info.min < 0 else info.max


class PoisonedMemory(TorchDispatchMode):
    """Fills what the `empty` family returns; `count` is the number of tensors poisoned so far."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _UNINITIALISED and out.device.type != "meta":
            out.fill_(poison_value(out.dtype))
            self.count += 1
        return out


@contextmanager
def poisoned_memory() -> Iterator[PoisonedMemory]:
    """Within the block torch.empty, empty_like, empty_strided, new_empty and the legacy constructors hold poison.

    It acts in the dispatcher, so it also sees calls in autograd functions, forward and backward (the autograd engine
    carries dispatch modes into its device threads), and launchers of Triton kernels. Scratch memory that one aten
    operator takes for itself is not touched; `Tensor.resize_` is not covered. Assert `count > 0` on the yielded
    object where a test would otherwise pass for want of any scratch memory.
    """
    with PoisonedMemory() as mode:
        yield mode
