"""Statistics of a whole micro-batch over the data x context parallel group, for the gates that need them.

Nothing here looks at a value on the host: shapes depend on the number of rows alone, which must be the same on every
rank of the group (as it is wherever Megatron's micro-batches have one shape).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from eaft_megatron.loss.exchange import all_gather_rows


def batch_quantile(columns: list[Tensor], valid: Tensor, q: float, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The q-quantile, linearly interpolated, of each column over the group's valid tokens.

    Args:
        columns: C tensors ``[N]`` of one floating-point dtype.
        valid: ``[N]`` bool.
        q: in [0, 1].
        group: ranks to look at; None for this process alone.

    Returns:
        C scalars; NaN where no token is valid, so that every comparison with them is false. One all-gather of
        N x (C + 1) numbers per rank.
    """
    rows = torch.stack([*columns, valid.to(columns[0].dtype)], dim=1)
    rows = all_gather_rows(rows, group).flatten(0, 1)
    keep = rows[:, -1] != 0
    return [_masked_quantile(rows[:, column], keep, q) for column in range(len(columns))]


def median_of_sequence_means(
    ce: Tensor, valid: Tensor, sequence_ids: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Median over sequences of their mean ``ce`` over valid tokens; a scalar of ce's dtype.

    A sequence may be spread over the group (context parallelism): what counts is its id. Sequences with no valid
    token are left out; NaN if none has one. Two all-gathers, of N ids and of N x 2 numbers per rank.
    """
    means, _ = _means_by_sequence(ce, valid, sequence_ids, group)
    return _masked_quantile(means, means.isfinite(), 0.5).to(ce.dtype)


def sequence_means(values: Tensor, valid: Tensor, sequence_ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[N]``, dtype of ``values``: to each token the mean over its sequence's valid tokens, wherever in the group.

    NaN in sequences with no valid token. The all-gathers of :func:`median_of_sequence_means`.
    """
    means, sequence = _means_by_sequence(values, valid, sequence_ids, group)
    rank = 0 if group is None else dist.get_rank(group)
    count = values.shape[0]
    return means[sequence[rank * count : (rank + 1) * count]].to(values.dtype)


def _means_by_sequence(
    values: Tensor, valid: Tensor, sequence_ids: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """``(means, sequence)``, both with an entry for each token of the group, rank by rank: float64 means over valid
    tokens, the sequences ordered by id and NaN beyond the last; and which of them each token belongs to."""
    ids = all_gather_rows(sequence_ids, group).flatten()
    rows = torch.stack([torch.where(valid, values, 0), valid.to(values.dtype)], dim=1)
    rows = all_gather_rows(rows, group).flatten(0, 1).double()
    if ids.numel() == 0:
        return rows[:, 0], ids
    # Sorted by id, every sequence is one run; segments beyond the last run have length 0.
    ids, order = ids.sort(stable=True)
    starts = torch.cat([ids.new_ones(1), (ids[1:] != ids[:-1]).to(ids.dtype)])
    segment = starts.cumsum(0) - 1
    lengths = torch.zeros_like(ids).scatter_add_(0, segment, torch.ones_like(ids))
    # Segment by segment in one order, so that every rank gets the same bits.
    totals = torch.segment_reduce(rows[order], "sum", lengths=lengths, unsafe=True)
    return totals[:, 0] / totals[:, 1], torch.empty_like(segment).scatter_(0, order, segment)


def _masked_quantile(values: Tensor, keep: Tensor, q: float) -> Tensor:
    """Linear interpolation between order statistics of ``values[keep]``, without knowing their number on the host."""
    count = keep.sum()
    ordered = values.masked_fill(~keep, float("inf")).sort().values
    if ordered.numel() == 0:
        return values.new_full((), float("nan"))
    position = q * (count - 1).clamp(min=0).to(torch.float64)
    low = position.floor().to(torch.int64)
    high = torch.minimum(low + 1, (count - 1).clamp(min=0))
    fraction = (position - low).to(values.dtype)
    below, above = ordered.gather(0, torch.stack([low, high])).unbind()  # ordered[low] would read low on the host
    quantile = torch.where(fraction == 0, below, below + (above - below) * fraction)
    return torch.where(count > 0, quantile, float("nan"))
