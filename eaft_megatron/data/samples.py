"""A prepared folder as samples of fixed length: several rows in each, or one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.loss.gates import flow_sample_weights

PADDING = -1
"""``sequence_ids`` of positions that belong to no row."""


class PreparedDataset(torch.utils.data.Dataset):
    """Samples of ``seq_length`` positions, in the order of the packing (or of the rows).

    Args:
        data: an opened prepared folder.
        seq_length: positions of a sample; for packed samples that of the packing.
        packed: several rows in a sample, as the folder's packing says; False: one row a sample.
        columns: per-token columns to give with each sample: a column of the folder ("ref_logprob"), or
            "sample_weight", FLOW's weights, worked out from ref_logprob.
        pad_token_id: what stands where nothing is; masked in any case.

    Attributes: ``truncated`` and ``dropped``, rows that were cut or left out when the folder was made.

    Raises:
        ValueError: a length that does not fit the folder, or a column it does not have.
    """

    def __init__(
        self,
        data: PreparedData,
        seq_length: int,
        *,
        packed: bool = True,
        columns: Sequence[str] = (),
        pad_token_id: int = 0,
    ) -> None:
        self.data = data
        self.path = data.path
        self.seq_length = seq_length
        self.packed = packed
        self.columns = tuple(columns)
        self._pad = pad_token_id
        counts = data.manifest["counts"]
        self.truncated = counts["truncated"]
        self.dropped = counts["dropped_overlong"] + counts["dropped_nothing_to_train_on"]
        self._check_length()
        self._multiple = data.manifest["packing"]["pad_to_multiple_of"] if packed else 1
        for name in self.columns:
            data.column("ref_logprob" if name == "sample_weight" else name, 0)

    def _check_length(self) -> None:
        packing = self.data.manifest["packing"]
        repack = f"`eaft-megatron prepare --repack {self.path} --seq-length {self.seq_length}`"
        if self.packed and packing is None:
            raise ValueError(f"{self.path} was prepared with --no-pack: pack it with {repack}, or train unpacked")
        if self.packed and packing["seq_length"] != self.seq_length:
            raise ValueError(
                f"--seq-length {self.seq_length}, but {self.path} is packed for {packing['seq_length']}: give that, or "
                f"pack it anew with {repack}"
            )
        longest = self.data.manifest["longest_row"]
        if longest > self.seq_length + 1:
            raise ValueError(
                f"--seq-length {self.seq_length}: {self.path} holds rows of up to {longest} tokens (one more than "
                "positions): give a longer one, or prepare the data for this one"
            )

    @property
    def max_token_id(self) -> int:
        """The largest token id of any sample."""
        return self.data.max_token_id

    def __len__(self) -> int:
        return self.data.manifest["packing"]["packs"] if self.packed else len(self.data)

    def rows(self, index: int) -> list[int]:
        """The rows of sample ``index``, in their order within it."""
        return self.data.pack(index).tolist() if self.packed else [range(len(self))[index]]

    def boundaries(self, index: int) -> np.ndarray:
        """``[d + 1]`` int32, Megatron's ``cu_seqlens``: where each row begins, then where each ends.

        The end of the last one is seq_length: what is left over counts as a row of padding.
        """
        ends = np.cumsum([0, *(self._positions(row) for row in self.rows(index))])
        if ends[-1] < self.seq_length:
            ends = np.append(ends, self.seq_length)
        return ends.astype(np.int32)

    def sample_length(self, index: int) -> int:
        """Positions of sample ``index`` up to the last that is not padding."""
        return sum(self._positions(row) for row in self.rows(index))

    def padded_length(self, indices: Iterable[int], pad_to_multiple_of: int = 1) -> int:
        """Length for ``collate`` that fits all of ``indices``: the longest, rounded up, at most seq_length."""
        longest = max(self.sample_length(index) for index in indices)
        return min(-(-longest // pad_to_multiple_of) * pad_to_multiple_of, self.seq_length)

    def _positions(self, row: int) -> int:
        """A row of n tokens fills n - 1 positions, each with the next token as its label; then it is padded."""
        return -(-(int(self.data.lengths[row]) - 1) // self._multiple) * self._multiple

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample, every tensor ``[seq_length]``.

        ``tokens``, ``labels``, ``position_ids`` (from 0 in each row) int64; ``loss_mask`` float32; each of ``columns``
        float32, 0 where the loss mask is 0; and, if packed, ``sequence_ids`` int64, the number of the row a position
        belongs to (-1: none). All of them are aligned with the labels.
        """
        size = self.seq_length
        tokens, labels = np.full(size, self._pad, np.int64), np.full(size, self._pad, np.int64)
        loss_mask, position_ids = np.zeros(size, np.float32), np.zeros(size, np.int64)
        sequence_ids = np.full(size, PADDING, np.int64)
        side = {name: np.zeros(size, np.float32) for name in self.columns}
        begin = 0
        for row in self.rows(index):
            ids, mask = self.data.tokens(row)
            end, room = begin + len(ids) - 1, begin + self._positions(row)
            tokens[begin:end] = ids[:-1]
            labels[begin:end] = ids[1:]
            loss_mask[begin:end] = mask[1:]
            position_ids[begin:room] = np.arange(room - begin)
            sequence_ids[begin:room] = row
            for name, values in side.items():
                values[begin:end] = np.where(mask[1:], self._column(name, row)[1:], 0)
            begin = room
        position_ids[begin:] = np.arange(size - begin)
        arrays = dict(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=position_ids, **side)
        if self.packed:
            arrays["sequence_ids"] = sequence_ids
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def compute_columns(self) -> None:
        """Work out now what a sample would otherwise wait for: FLOW's weights take a pass over all scores."""
        if "sample_weight" in self.columns:
            _ = self._sample_weights

    def _column(self, name: str, row: int) -> np.ndarray:
        if name == "sample_weight":
            return np.full(int(self.data.lengths[row]), self._sample_weights[row], np.float32)
        return self.data.column(name, row)

    @functools.cached_property
    def _sample_weights(self) -> np.ndarray:
        return flow_weights(self.data)


def flow_weights(data: PreparedData) -> np.ndarray:
    """``[rows]`` float32: FLOW's weights, ``exp(-f_i / tau)`` (arXiv 2502.02797).

    f_i is the frozen base model's mean loss on the trained tokens of row i, tau the median of all f_i (floor 1e-6).
    Needs the column ref_logprob.
    """
    losses = np.empty(len(data), np.float64)
    for row in range(len(data)):
        _, mask = data.tokens(row)
        trained = np.array(mask)
        trained[0] = False  # nothing predicts the first token
        losses[row] = -data.column("ref_logprob", row)[trained].astype(np.float64).mean()
    return flow_sample_weights(torch.from_numpy(losses)).float().numpy()


def block_diagonal_mask(sequence_ids: torch.Tensor) -> torch.Tensor:
    """``[..., s]`` ids -> ``[..., 1, s, s]`` bool, True where a query must *not* look: other rows, and the future.

    Megatron's convention for ``attention_mask``. s x s flags: for the CPU and for short samples.
    """
    size = sequence_ids.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=sequence_ids.device).triu(1)
    other = sequence_ids.unsqueeze(-1) != sequence_ids.unsqueeze(-2)
    return (other | future).unsqueeze(-3)
