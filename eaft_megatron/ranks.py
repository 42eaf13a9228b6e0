"""What all processes of a job must agree on, and a job of one process. Importing this needs no torch."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """What torchrun would have set and nobody did: one process, at a free port of this machine.

    Where RANK or WORLD_SIZE says that there are more, nothing is set.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    if os.environ.get("RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    world = {name: value for name, value in defaults.items() if name not in os.environ}
    if "MASTER_PORT" not in os.environ or "MASTER_ADDR" in world:
        world["MASTER_PORT"] = free_port()
    before = {name: os.environ.get(name) for name in world}
    os.environ.update(world)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def gather(value: T) -> list[T]:
    """The value of every rank, in their order, on every rank; of this process alone where there is no group."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_failure(failure: str | None) -> str | None:
    """The first rank's failure, on every rank; None where no rank has one. A collective."""
    return next((text for text in gather(failure) if text), None)


def on_rank_0(action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank. A collective.

    Raises:
        ValueError, OSError: what it raises there, on every rank.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return action()
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
