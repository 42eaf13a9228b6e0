"""Parsing as 0.12 to 0.17 do it: within pretrain, under names imported here; and the process group."""

import torch

from .arguments import parse_args, validate_args
from .global_vars import get_args, set_args


def initialize_megatron(extra_args_provider=None, args_defaults={}, allow_no_cuda=False):  # noqa: B006
    if not allow_no_cuda:
        assert torch.cuda.is_available(), "Megatron requires CUDA."
    if get_args() is None:
        args = parse_args(extra_args_provider)
        validate_args(args, args_defaults)
        set_args(args)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(get_args().distributed_backend)
    parallel_state.initialize_model_parallel(get_args().tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(1)
