"""Helpers for tests: real processes on gloo, poisoned scratch memory. Importing this needs torch alone.

`cpu` (stand-ins for CUDA calls) and `tiny_gpt` (small models) need megatron-core: import them by their own names.
"""

from eaft_megatron.testing.distributed import DistributedError, run_distributed
from eaft_megatron.testing.poison import poisoned_memory

__all__ = ["DistributedError", "poisoned_memory", "run_distributed"]
