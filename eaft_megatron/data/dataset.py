"""Chat or text JSONL as fixed-length samples, tokenized when opened. For data that fits in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from eaft_megatron.data.chat import EncodedSample, encode_chat, encode_text
from eaft_megatron.data.jsonl import iter_jsonl


@dataclass(frozen=True)
class _Row:
    ids: torch.Tensor  # int32 [n], 2 <= n <= seq_length + 1
    labels_mask: torch.Tensor  # bool [n]


class SFTDataset(torch.utils.data.Dataset):
    """Samples of `seq_length` positions from a JSONL file, one per row, in the order of the file.

    A row has `messages` (a conversation, with an optional `tools` list; the assistant's tokens are trained on) or
    `text` (every token but the first). Where both stand, `messages` counts. A row longer than seq_length + 1 tokens
    is cut on the right; a row left with nothing to train on is dropped.

    Attributes: `truncated` and `dropped`, the number of rows cut and dropped (a row may be both).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a bad row (file and line in the message), or no row left to train on.
    """

    def __init__(self, path: str | PathLike, tokenizer: Any, seq_length: int) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, not {seq_length}")
        self.path = path
        self.seq_length = seq_length
        self.truncated = 0
        self.dropped = 0
        self._pad = _pad_token(tokenizer)
        self._rows: list[_Row] = []
        for number, row in iter_jsonl(path):
            try:
                self._add(_encode_row(tokenizer, row))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        if not self._rows:
            raise ValueError(
                f"{path}: no row has a token to train on within {seq_length + 1} tokens "
                f"({self.dropped} rows, {self.truncated} of them cut)"
            )

    def _add(self, sample: EncodedSample) -> None:
        limit = self.seq_length + 1
        if len(sample.input_ids) > limit:
            self.truncated += 1
            sample = sample.truncate(limit)
        if any(sample.labels_mask[1:]):  # nothing predicts the first token
            ids = torch.tensor(sample.input_ids, dtype=torch.int32)
            self._rows.append(_Row(ids, torch.tensor(sample.labels_mask)))
        else:
            self.dropped += 1

    @property
    def max_token_id(self) -> int:
        """The largest token id of any sample; a model needs a vocabulary beyond it."""
        return max(int(row.ids.max()) for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def sample_length(self, index: int) -> int:
        """Positions of sample `index` that are not padding (1..seq_length)."""
        return self._rows[index].ids.numel() - 1

    def padded_length(self, indices: Iterable[int], pad_to_multiple_of: int = 1) -> int:
        """Length for `collate` that fits all of `indices`: the longest, rounded up, at most seq_length."""
        longest = max(self.sample_length(index) for index in indices)
        return min(-(-longest // pad_to_multiple_of) * pad_to_multiple_of, self.seq_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample, every tensor [seq_length].

        `tokens`, `labels` (labels[t] is the token after tokens[t]) and `position_ids` int64; `loss_mask` float32, 0 on
        padding and on labels that are not trained on. The padding is masked by position: in some vocabularies the
        padding token is the end-of-turn token, which must be trained where it is real.
        """
        row = self._rows[index]
        length = row.ids.numel() - 1
        tokens = torch.full((self.seq_length,), self._pad, dtype=torch.int64)
        labels = torch.full((self.seq_length,), self._pad, dtype=torch.int64)
        loss_mask = torch.zeros(self.seq_length)
        tokens[:length] = row.ids[:-1]
        labels[:length] = row.ids[1:]
        loss_mask[:length] = row.labels_mask[1:].float()
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self.seq_length),
        }


def _encode_row(tokenizer: Any, row: dict[str, Any]) -> EncodedSample:
    if "messages" in row:
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise ValueError(f"'tools' must be a list, found {type(tools).__name__}")
        return encode_chat(tokenizer, row["messages"], tools=tools or None)
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"'text' must be a string, found {type(row['text']).__name__}")
        return encode_text(tokenizer, row["text"])
    raise ValueError(f"a row needs 'messages' or 'text'; this one has {sorted(row)}")


def _pad_token(tokenizer: Any) -> int:
    """Any id will do, padding being masked; the tokenizer's own reads best in a debugger."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
