"""What a checkpoint's flags are compared by."""

from .global_vars import get_args


def check_checkpoint_args(checkpoint_args, skip_args=None):
    assert checkpoint_args.tensor_model_parallel_size == get_args().tensor_model_parallel_size
