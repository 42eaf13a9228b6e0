"""What a gate is: the base class, and what it is given and gives."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.token_stats import TokenStats


class GateOutput(NamedTuple):
    """Per token, flat: the loss, d loss / d ce, and the weight to report. All detached."""

    loss: Tensor
    slope: Tensor
    weight: Tensor


@dataclasses.dataclass(frozen=True)
class GateContext:
    """What a gate may use beyond the statistics. Every tensor is flat, one entry per token.

    Attributes:
        side: extra columns by name.
        sequence_ids: int64; tokens with one id belong to one sequence, wherever in ``reduce_group`` they are.
        reduce_group: data x context parallel group for statistics of the batch; None for this process alone.
    """

    side: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    sequence_ids: Tensor | None = None
    reduce_group: dist.ProcessGroup | None = None


class Gate(abc.ABC):
    """Base of all gates. Instances are frozen dataclasses holding plain numbers.

    Attributes:
        needs: which optional fields of :class:`TokenStats` must be filled: ``"entropy"``, ``"sum_p_squared"``.
        needs_side: names of the side columns the gate reads.
        needs_sequence_ids: whether it reads ``sequence_ids``.
        needs_batch: whether it takes statistics over ``reduce_group``.
        uses_probability: whether the weight follows the target's probability, the model's or the base model's: the
            hook's metrics then say how many tokens have weight 0, and what confident conflicts weigh.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_side: ClassVar[tuple[str, ...]] = ()
    uses_probability: ClassVar[bool] = True

    @property
    def needs_sequence_ids(self) -> bool:
        """See above."""
        return False

    @property
    def needs_batch(self) -> bool:
        """See above."""
        return False

    def check(self, topk: int) -> None:  # noqa: B027  not abstract: most gates have nothing to check
        """Raise ``ValueError`` if the gate cannot work with this K = min(topk, V); the default accepts any."""

    @abc.abstractmethod
    def weight(self, stats: TokenStats, context: GateContext) -> Tensor:
        """``[N]`` weight of each token. Values at ignored tokens do not matter."""

    def __call__(self, stats: TokenStats, context: GateContext) -> GateOutput:
        """Weight the cross entropy. A target with p = 0 has an infinite loss, also where its weight is 0."""
        weight = torch.where(stats.valid, self.weight(stats, context).to(stats.ce.dtype), 0)
        loss = torch.where(torch.isposinf(stats.ce), stats.ce, weight * stats.ce)
        return GateOutput(loss, weight, weight)


def check_number(condition: bool, message: str, value: float) -> None:
    if not (math.isfinite(value) and condition):
        raise ValueError(f"{message}, got {value}")
