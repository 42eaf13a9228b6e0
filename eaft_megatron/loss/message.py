"""What one rank tells the others about every token, as one block of bytes that a single all-gather moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.collectives import start_all_gather_rows


@dataclasses.dataclass(frozen=True)
class Message:
    """Logits in their own dtype, in which they are exact, and sums in the compute dtype, which must not lose a bit.

    For bf16 logits and K = 20 that is 46 bytes a token: 21 logits of 2 bytes and one sum of 4. Sums lie
    first, then logits, each part filled up to 16 bytes so that all of them are aligned on every rank.

    Attributes:
        buffer: uint8 ``[B]``, or ``[tp, B]`` once gathered.
        tokens: N.
        columns: logits per token: the k largest, descending, then (in a message with sums) the target's.
        rows: sums per token: none, the sum of exponentials, or that and the sum of their squares, relative to the
            rank's own maximum.
        dtype: of the logits.
    """

    buffer: Tensor
    tokens: int
    columns: int
    rows: int
    dtype: torch.dtype

    @classmethod
    def empty(cls, tokens: int, columns: int, rows: int, dtype: torch.dtype, device: torch.device) -> Message:
        """A message to be filled through :attr:`values` and :attr:`sums`."""
        size = _aligned(tokens * rows * _sum_dtype(dtype).itemsize) + _aligned(tokens * columns * dtype.itemsize)
        # Never empty: torch would not view a gathered [tp, 0] as another dtype.
        return cls(torch.empty(max(size, 16), dtype=torch.uint8, device=device), tokens, columns, rows, dtype)

    @classmethod
    def of(cls, local: Tensor, k: int, dtype: torch.dtype) -> Message:
        """From ``[N, k + 2 (+ 1)]`` statistics as :func:`eaft_megatron.loss.torch_impl.local_statistics` has them."""
        message = cls.empty(local.shape[0], k + 1, local.shape[1] - k - 1, dtype, local.device)
        message.values[:, :k] = local[:, :k]
        message.values[:, k] = local[:, k + 1]
        message.sums[0] = local[:, k]
        message.sums[1:] = local[:, k + 2 :].T
        return message

    def statistics(self) -> Tensor:
        """The inverse of :meth:`of`."""
        values, k = self.values.to(_sum_dtype(self.dtype)), self.columns - 1
        return torch.cat([values[:, :k], self.sums[:1].T, values[:, k:], self.sums[1:].T], dim=1)

    @property
    def values(self) -> Tensor:
        """``[(tp,) N, columns]`` view of the logits."""
        begin = _aligned(self.tokens * self.rows * _sum_dtype(self.dtype).itemsize)
        end = begin + self.tokens * self.columns * self.dtype.itemsize
        return self.buffer[..., begin:end].view(self.dtype).unflatten(-1, (self.tokens, self.columns))

    @property
    def sums(self) -> Tensor:
        """``[(tp,) rows, N]`` view of the sums."""
        dtype = _sum_dtype(self.dtype)
        end = self.tokens * self.rows * dtype.itemsize
        return self.buffer[..., :end].view(dtype).unflatten(-1, (self.rows, self.tokens))

    def gather(self, group: dist.ProcessGroup | None) -> Message:
        """Every rank's message, in rank order: one all-gather."""
        return self.send(group)()

    def send(self, group: dist.ProcessGroup | None) -> Callable[[], Message]:
        """:meth:`gather`, begun: what it returns waits for the other ranks' messages."""
        arrived = start_all_gather_rows(self.buffer, group)
        return lambda: dataclasses.replace(self, buffer=arrived())


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
