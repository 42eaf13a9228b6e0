"""What all ranks agree on, and a world of one beside whatever else the machine runs."""

from __future__ import annotations

import os
import socket

import pytest
import torch.distributed as dist

from eaft_megatron.ranks import first_failure, gather, on_rank_0, world_of_one
from eaft_megatron.testing.distributed import run_distributed

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare(monkeypatch):
    """An environment that no launcher has touched."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_world_of_one_beside_a_taken_port(bare):
    """torch's usual port is taken: a world of one starts all the same, twice, and leaves no variable."""
    with socket.socket() as taken:
        try:
            taken.bind(("localhost", 29500))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which serves as well
        for _ in range(2):
            with world_of_one():
                dist.init_process_group("gloo")
                assert dist.get_world_size() == 1
                dist.destroy_process_group()
            assert not [name for name in _VARIABLES if name in os.environ]


def test_a_launcher_s_world_is_kept(bare, monkeypatch):
    """What torchrun set stays, and nothing is made up for a job of several processes."""
    for name, value in zip(_VARIABLES, ("1", "2", "1", "node0", "1234"), strict=True):
        monkeypatch.setenv(name, value)
    with world_of_one():
        assert [os.environ[name] for name in _VARIABLES] == ["1", "2", "1", "node0", "1234"]
    monkeypatch.delenv("MASTER_PORT")
    with world_of_one():
        assert "MASTER_PORT" not in os.environ


def test_without_a_group():
    """One process agrees with itself."""
    assert gather(3) == [3] and on_rank_0(lambda: 4) == 4 and first_failure(None) is None


def _agree() -> tuple:
    rank = dist.get_rank()
    failure = first_failure(f"rank {rank}" if rank else None)
    answer = on_rank_0(lambda: f"from {rank}")
    try:
        on_rank_0(_refuse)
    except ValueError as error:
        return gather(rank), failure, first_failure(None), answer, str(error)


def _refuse() -> None:
    raise ValueError(f"refused on {dist.get_rank()}")


def test_every_rank_has_the_same_answer():
    """Values, the first failure and rank 0's error reach every rank."""
    expected = ([0, 1, 2], "rank 1", None, "from 0", "refused on 0")
    assert run_distributed(_agree, 3) == [expected] * 3
