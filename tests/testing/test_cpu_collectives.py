"""Collectives of expert parallelism on gloo, as megatron-core calls them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from eaft_megatron.testing import run_distributed
from eaft_megatron.testing.cpu_collectives import with_split_lists, with_unequal_parts


def exchange() -> tuple[list, list, list]:
    """What each of two ranks gets: unequal parts (sent twice, the second time as a request), and an all-to-all."""
    rank, lengths = dist.get_rank(), [3, 1]
    gather, all_to_all = with_unequal_parts(dist.all_gather), with_split_lists(dist.all_to_all_single)
    gathered = torch.empty(4, 2)
    gather(list(gathered.split(lengths)), torch.full((lengths[rank], 2), rank + 1.0))
    again = torch.empty(4, 2, dtype=torch.int64)
    parts = list(again.split(lengths[::-1]))
    gather(parts, torch.full((lengths[::-1][rank], 2), rank), async_op=True).wait()
    sent = torch.arange(3.0) + 10 * rank
    received = torch.empty(4 if rank == 0 else 2)
    splits = torch.tensor([2, 2] if rank == 0 else [1, 1])
    all_to_all(received, sent, output_split_sizes=splits, input_split_sizes=torch.tensor([2, 1]))
    return gathered[:, 0].tolist(), again[:, 1].tolist(), received.tolist()


def test_unequal_parts_and_splits_that_are_tensors():
    """Every rank's rows arrive in rank order; each rank gets the tokens meant for it."""
    first, second = run_distributed(exchange, 2)
    assert first[0] == second[0] == [1, 1, 1, 2]
    assert first[1] == second[1] == [0, 1, 1, 1]
    assert first[2] == [0, 1, 10, 11] and second[2] == [2, 12]


def equal_parts() -> list:
    gathered = [torch.empty(2), torch.empty(2)]
    with_unequal_parts(dist.all_gather)(gathered, torch.full((2,), float(dist.get_rank())))
    return torch.cat(gathered).tolist()


def test_equal_parts_go_the_usual_way():
    """The common case is gloo's own all-gather."""
    assert run_distributed(equal_parts, 2) == [[0, 0, 1, 1]] * 2
