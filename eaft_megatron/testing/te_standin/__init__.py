"""A stand-in for Transformer Engine in plain torch: megatron-core's TE layer specs, context parallelism, packed (THD)
batches and grouped experts on a machine without a GPU.

It follows the Python interface of Transformer Engine 2.9 as far as megatron-core 0.16 to 0.19 uses it in bf16 and
fp32. It shows that layers, masks, token order, process groups and checkpoint keys fit together; it says nothing of
TE's kernels or their speed. Whatever it cannot do is an error.

It is never importable as ``transformer_engine`` by being installed or by lying on the path, because megatron-core and
others take the mere presence of that name for an answer: only :func:`transformer_engine_standin` makes it so.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from eaft_megatron.megatron_map import CORE
from eaft_megatron.testing.te_standin.modules import ROOTS, Finder

_active = False


@contextlib.contextmanager
def transformer_engine_standin() -> Iterator[None]:
    """Within the block ``import transformer_engine`` finds the stand-in, a real one installed or not.

    megatron-core looks for Transformer Engine when it is imported, and keeps what it found: enter the block first, in
    a process that does nothing else afterwards. A block within a block changes nothing.

    Raises:
        RuntimeError: CUDA is available, or megatron-core or a Transformer Engine is imported already.
    """
    global _active
    if _active:
        yield
        return
    if torch.cuda.is_available():
        raise RuntimeError("the Transformer Engine stand-in is for machines without CUDA: install the real one here")
    for name in (*ROOTS, CORE):
        if name in sys.modules:
            raise RuntimeError(
                f"{name} is imported already, so the Transformer Engine stand-in comes too late: enter "
                "transformer_engine_standin() first, in a process of its own"
            )
    finder = Finder()
    sys.meta_path.insert(0, finder)
    _active = True
    try:
        yield
    finally:
        _active = False
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
            del sys.modules[name]
