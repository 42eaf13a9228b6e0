"""Collectives of expert parallelism that gloo does not take as megatron-core gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Finished:
    """The handle of a request that is over already."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def with_split_lists(all_to_all_single: Callable) -> Callable:
    """Split sizes as lists: megatron-core's token dispatcher brings them to the host only where they are on a GPU."""

    def run(
        output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **options: Any
    ) -> Any:
        sizes = (x.tolist() if isinstance(x, Tensor) else x for x in (output_split_sizes, input_split_sizes))
        return all_to_all_single(output, input, *sizes, **options)

    return run


def with_unequal_parts(all_gather: Callable) -> Callable:
    """Ranks may hold tensors that differ in their first dimension: all travel as long as the longest.

    Where experts are spread over tensor- and expert-parallel ranks, each rank has its own number of tokens.
    """

    def run(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        lengths = [len(part) if part.dim() else 1 for part in tensor_list]
        if len(set(lengths)) == 1:
            return all_gather(tensor_list, tensor, group, async_op)
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        all_gather(parts, padded, group)
        for part, received, length in zip(tensor_list, parts, lengths, strict=True):
            part.copy_(received[:length])
        return Finished() if async_op else None

    return run
