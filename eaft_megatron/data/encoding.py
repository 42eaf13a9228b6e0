"""Input rows into encoded samples, in this process or in several, in the order of the input."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from eaft_megatron.data.chat import EncodedSample, encode_row
from eaft_megatron.data.layouts import canonical_row
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.sources import Source, parse

_BATCH_ROWS = 128
_IN_FLIGHT = 3  # batches a worker: one at work, one waiting, one being written


def load_tokenizer(name: str | os.PathLike) -> Any:
    """``AutoTokenizer``, or a ``ValueError`` that says what was tried."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises no narrower one for a file it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--tokenizer {name}: cannot be loaded by transformers.AutoTokenizer: {reason}") from error


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Some input rows: ``(where it stands, bytes or dict)`` each."""

    rows: list[tuple[str, Any]]
    source: int  # which of the sources

    @property
    def size(self) -> int:
        """In what the source's progress bar counts: bytes of JSON lines, else rows."""
        return sum(len(raw) if isinstance(raw, bytes) else 1 for _, raw in self.rows)


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """What became of some input rows."""

    samples: list[tuple[int, str, np.ndarray, np.ndarray]]  # number within the batch, where it stood, ids, mask
    rows: int  # input rows, blank lines left out
    split: int  # rows that became a sample for each turn
    repeated: int  # tokens that stand in several samples of one row
    lossy: int  # rows of which the chat template left something out
    untrained: int  # turns that are context by their own flag
    unended: int  # conversations whose last answer ends with no special token
    errors: list[str]
    losses: list[str]  # the first thing lost of each such row, in words
    source: int
    size: int


def _encode_batch(tokenizer: Any, options: PrepareOptions, batch: _Batch) -> EncodedBatch:
    samples, errors, losses = [], [], []
    rows = split = repeated = lossy = untrained = unended = 0
    special = set(tokenizer.added_tokens_decoder)
    for where, raw in batch.rows:
        try:
            row = parse(raw, where)
            if row is None:
                continue
            encoded, is_chat = _encode(tokenizer, options, row, where)
        except ValueError as error:
            if options.on_error == "stop":
                raise ValueError(
                    f"{error} (`eaft-megatron prepare --on-error skip` leaves such rows out and counts them)"
                ) from error
            errors.append(str(error))
        else:
            split += encoded.split
            lengths = [len(sample.input_ids) for sample in encoded.samples]
            repeated += sum(lengths) - max(lengths, default=0)
            lossy += bool(encoded.losses)
            untrained += encoded.untrained
            if encoded.losses:
                losses.append(f"{where}: {encoded.losses[0]}")
            unended += is_chat and bool(encoded.samples) and not _ends(encoded.samples[-1], special)
            for sample in encoded.samples:  # as arrays: the parent process has all of them to write
                ids, mask = np.asarray(sample.input_ids, np.int32), np.asarray(sample.labels_mask, bool)
                samples.append((rows, where, ids, mask))
        rows += 1
    return EncodedBatch(
        samples, rows, split, repeated, lossy, untrained, unended, errors, losses, batch.source, batch.size
    )


def _encode(tokenizer: Any, options: PrepareOptions, row: dict, where: str):
    try:
        canonical = canonical_row(row, options.columns)
        encoded = encode_row(
            tokenizer,
            canonical,
            train_on=options.train_on,
            end_token=options.end_token,
            on_loss=options.on_loss,
            empty_thinking=options.empty_thinking,
            chat_template_kwargs=options.chat_template_kwargs,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # values of types that no layout has
        raise ValueError(f"{where}: not a row we understand ({type(error).__name__}: {error})") from error
    longest = max((len(sample.input_ids) for sample in encoded.samples), default=0)
    if options.overlong == "error" and longest > options.seq_length + 1:
        raise ValueError(
            f"{where}: {longest} tokens, and --seq-length {options.seq_length} holds {options.seq_length + 1}: make it "
            "longer, or give --overlong truncate or drop"
        )
    return encoded, "messages" in canonical


def _ends(sample: EncodedSample, special: set[int]) -> bool:
    """Whether the last token that is trained on is a special one: what stops the model."""
    trained = [token for token, flag in zip(sample.input_ids, sample.labels_mask, strict=True) if flag]
    return bool(trained) and trained[-1] in special


def encode_all(
    sources: Sequence[Source], tokenizer: Any, options: PrepareOptions, num_workers: int, progress: bool
) -> Iterator[EncodedBatch]:
    """The batches of all sources, encoded, in order; with several workers each has a copy of the tokenizer."""
    batches = (_Batch(rows, index) for index, source in enumerate(sources) for rows in source.batches(_BATCH_ROWS))
    with ExitStack() as stack:
        bars = stack.enter_context(_progress_bars(sources, progress))
        if num_workers <= 1:
            results: Iterable[EncodedBatch] = (_encode_batch(tokenizer, options, batch) for batch in batches)
        else:
            # Not fork: this process may hold threads of torch and of the tokenizer.
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (tokenizer, options))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            results = _in_order(pool, batches, num_workers * _IN_FLIGHT)
        for encoded in results:
            yield encoded
            bars(encoded)


def _in_order(pool, batches: Iterable[_Batch], in_flight: int) -> Iterator[EncodedBatch]:
    """As ``pool.map``, which would read the whole input ahead."""
    pending: collections.deque = collections.deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) >= in_flight:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker process was killed, perhaps for want of memory: give fewer --num-workers") from error


_worker: tuple[Any, PrepareOptions] | None = None  # set in worker processes alone


def _start_worker(tokenizer: Any, options: PrepareOptions) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (tokenizer, options)


def _work(batch: _Batch) -> EncodedBatch:
    assert _worker is not None, "not a worker process"
    return _encode_batch(*_worker, batch)


@contextmanager
def _progress_bars(sources, shown: bool) -> Iterator[Any]:
    """A function to call with each batch done: one bar a source, in bytes where the source knows them."""
    from tqdm import tqdm

    bar, current = None, None

    def advance(encoded: EncodedBatch) -> None:
        nonlocal bar, current
        source = sources[encoded.source]
        if current != encoded.source:
            if bar is not None:
                bar.close()
            in_bytes = bool(source.n_bytes)
            total = source.n_bytes or source.n_rows
            unit = dict(unit="B", unit_scale=True, unit_divisor=1024) if in_bytes else dict(unit=" rows")
            bar = tqdm(total=total, desc=os.path.basename(source.name) or source.name, disable=not shown, **unit)
            current = encoded.source
        bar.update(encoded.size)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()
