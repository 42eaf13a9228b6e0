"""One pass of a frozen model over a prepared folder: the columns ``ref_logprob``, ``topk_entropy`` and ``entropy``.

Rows are scored in windows of consecutive rows. A finished window is a file in ``columns/.scoring/``; once all are
there they become columns, each in one step. A run that was killed finds the finished windows and goes on.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eaft_megatron._version import __version__
from eaft_megatron.analysis.batching import WINDOW_TOKENS, batches, windows
from eaft_megatron.analysis.token_scores import ENTROPY, IGNORED, LOGPROB, SUM_P_SQUARED, TOPK_ENTROPY
from eaft_megatron.data.prepared import PreparedData, write_column
from eaft_megatron.files import replacing, write_json

FIDELITY_TOPK = (5, 10, 20, 50)
_SCORES = re.compile(rf"{LOGPROB}|{ENTROPY}|{SUM_P_SQUARED}|{TOPK_ENTROPY}(_\d+)?")
_REQUEST = "request.json"


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What to write.

    Attributes:
        topk: K of ``topk_entropy``.
        full_entropy: also write ``entropy``, over the whole vocabulary.
        fidelity: also ``topk_entropy_K`` for K = 5, 10, 20, 50 (but ``topk``'s own), and ``entropy`` to compare with.
        batch_tokens: positions of a batch, padding included; a longer row makes a batch of its own.
        overwrite: replace scores of another model.
        sum_p_squared: also write ``sum_p_squared``, the chance that two draws from the prediction agree.
    """

    topk: int = 20
    full_entropy: bool = False
    fidelity: bool = False
    batch_tokens: int = 4096
    overwrite: bool = False
    sum_p_squared: bool = False

    def __post_init__(self) -> None:
        if self.topk < 2:
            raise ValueError(f"--topk {self.topk}: the entropy of fewer than 2 outcomes is 0; give 2 or more")
        if self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens must be positive, got {self.batch_tokens}")

    @property
    def columns(self) -> dict[str, int | None]:
        """Name -> K of a top-K entropy, None for the others."""
        columns: dict[str, int | None] = {LOGPROB: None, TOPK_ENTROPY: self.topk}
        if self.full_entropy or self.fidelity:
            columns[ENTROPY] = None
        if self.sum_p_squared:
            columns[SUM_P_SQUARED] = None
        if self.fidelity:
            columns |= {f"{TOPK_ENTROPY}_{k}": k for k in FIDELITY_TOPK if k != self.topk}
        return columns


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows padded on the right, where causal attention never looks.

    Attributes:
        tokens: ``[b, s]`` int64, each row without its last token.
        target: ``[b, s]`` int64, each row without its first token; ``IGNORED`` beyond its end.
        rows: the ``b`` rows.
    """

    tokens: Tensor
    target: Tensor
    rows: list[int]


class Backend(Protocol):
    """A model that scores batches."""

    def run(
        self, parts: list[Batch], columns: dict[str, int | None], tick: Callable[[int], None]
    ) -> list[dict[str, Tensor]] | None:
        """The columns of each batch, ``[b, s]``; None on a process that does not hold them. ``tick(tokens)`` after
        each batch."""
        ...


class Team:
    """The processes of a run; this one is alone.

    Attributes:
        leads: whether this process plans, talks and writes the columns.
        writes: whether ``Backend.run`` gives it the scores.
        share: (index, count): which of the windows are its own.
    """

    leads = True
    writes = True
    share = (0, 1)

    def agree(self, function: Callable[[], Any]) -> Any:
        """What ``function`` gives on the leading process, on every process; its ValueError and OSError too."""
        return function()

    def wait(self) -> None:
        """Until every process is here."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is left to do: columns to put in place, those that are being scored, and the rows still to be scored."""

    wanted: list[str]
    scored: dict[str, int | None]
    todo: list[tuple[int, int]]


def score(
    data: PreparedData,
    record: dict[str, Any],
    options: ScoreOptions,
    load: Callable[[], Backend],
    *,
    team: Team | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Write the columns that ``data`` lacks; returns their names (none where all of them are there already).

    Args:
        record: what goes into each column's manifest: "model" (:func:`~eaft_megatron.analysis.model_record`) and
            "dtype" decide whether a column that is there is this model's.
        load: the model; called only if there is something to score.
        team: the processes that share the work; all of them must see the folder. None: this one alone.
        progress: show a bar.
        say: where remarks go.

    Raises:
        ValueError: scores of another model or with another K are there and ``options.overwrite`` is not set; or a
            score that is not a finite number.
    """
    team = team or Team()
    folder = data.path / "columns" / ".scoring"
    plan = team.agree(lambda: _make_plan(data, folder, record, options, say))
    if plan.todo:
        _score_windows(data, folder, plan, options, load(), team, progress)
    team.wait()
    if plan.wanted:
        team.agree(lambda: _put_in_place(data, folder, plan, record, options))
    return plan.wanted


def column_record(record: dict[str, Any], topk: int | None) -> dict[str, Any]:
    """The manifest of one column."""
    return {**record, **({} if topk is None else {"topk": topk}), "eaft_megatron": __version__}


def same_model(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two columns' records name one model, run in one precision."""

    def identity(record: dict[str, Any]) -> tuple:
        model = record.get("model")
        model = model if isinstance(model, dict) else {"name": model}
        return model.get("config_sha256"), model.get("weights_fingerprint"), record.get("dtype")

    return None not in identity(first) and identity(first) == identity(second)


def _make_plan(
    data: PreparedData, folder: Path, record: dict[str, Any], options: ScoreOptions, say: Callable[[str], None]
) -> _Plan:
    wanted = _missing_columns(data, record, options)
    if not wanted:
        shutil.rmtree(folder, ignore_errors=True)
        return _Plan([], {}, [])
    request = {
        **{key: record[key] for key in ("model", "dtype")},
        "columns": {name: options.columns[name] for name in wanted},
        "window_tokens": WINDOW_TOKENS,
        "rows": len(data),
    }
    begun = _read_request(folder)
    if begun is not None and not _continues(begun, request):
        say(f"{data.path}: an unfinished pass of another model, or for other columns, is dropped")
        begun = None
    if begun is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / _REQUEST, request, durable=True)
        begun = request
    every = windows(data.lengths)
    todo = [window for window in every if not _part(folder, window).exists()]
    if len(todo) < len(every):
        rows = sum(end - begin for begin, end in todo)
        say(f"{data.path}: continued, {rows:,} of {len(data):,} rows are left")
    return _Plan(wanted, begun["columns"], todo)


def _missing_columns(data: PreparedData, record: dict[str, Any], options: ScoreOptions) -> list[str]:
    """Columns to make. With ``overwrite``, scores of another model or K are removed first, all of them."""
    columns = {name: found for name, found in data.columns().items() if _SCORES.fullmatch(name)}
    for name, found in columns.items():
        topk = options.columns.get(name, found.get("topk"))
        if same_model(found, record) and found.get("topk") == topk:
            continue
        if not options.overwrite:
            model = found.get("model")
            model = model.get("name") if isinstance(model, dict) else model
            raise ValueError(
                f"{data.path}: column {name} is there, by another model, precision or K ({model}, "
                f"{found.get('dtype')}, K {found.get('topk')}): --overwrite replaces it"
            )
        shutil.rmtree(data.path / "columns" / name)
    columns = data.columns()
    return [name for name in options.columns if name not in columns]


def _read_request(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _continues(begun: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether what is begun is this model's and holds (at least) the columns asked for."""
    same = same_model(begun, request) and all(begun[key] == request[key] for key in ("window_tokens", "rows"))
    return same and request["columns"].items() <= begun["columns"].items()


def _score_windows(
    data: PreparedData,
    folder: Path,
    plan: _Plan,
    options: ScoreOptions,
    backend: Backend,
    team: Team,
    progress: bool,
) -> None:
    from tqdm import tqdm

    index, count = team.share
    rank_rows = plan.todo[index::count]
    total = sum(int((data.lengths[begin:end] - 1).sum()) for begin, end in rank_rows)
    shown = progress and team.leads
    with tqdm(total=total, desc=f"score {data.path.name}", unit=" tokens", unit_scale=True, disable=not shown) as bar:
        for begin, end in rank_rows:
            parts = [make_batch(data, rows) for rows in batches(data.lengths, begin, end, options.batch_tokens)]
            scores = backend.run(parts, plan.scored, bar.update)
            if team.writes:
                assert scores is not None
                values = _in_row_order(data, (begin, end), parts, scores, plan.scored)
                with replacing(_part(folder, (begin, end)), durable=True) as partial:
                    np.save(partial, values)


def make_batch(data: PreparedData, rows: list[int]) -> Batch:
    """These rows, padded to the longest of them."""
    longest = max(int(data.lengths[row]) for row in rows) - 1
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    target = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(data.tokens(row)[0].astype(np.int64))
        tokens[i, : len(ids) - 1] = ids[:-1]
        target[i, : len(ids) - 1] = ids[1:]
    return Batch(tokens, target, rows)


def _in_row_order(
    data: PreparedData,
    window: tuple[int, int],
    parts: list[Batch],
    scores: list[dict[str, Tensor]],
    columns: dict[str, int | None],
) -> np.ndarray:
    """``[columns, tokens]`` float32: the tokens of the window's rows, one row after the other.

    The first token of a row, which nothing predicts, has 0.
    """
    begin, end = window
    starts = np.concatenate([[0], np.cumsum(data.lengths[begin:end])])
    values = np.zeros((len(columns), starts[-1]), np.float32)
    for part, found in zip(parts, scores, strict=True):
        for j, name in enumerate(columns):
            table = found[name].numpy()
            for i, row in enumerate(part.rows):
                start, n = starts[row - begin], int(data.lengths[row])
                values[j, start + 1 : start + n] = table[i, : n - 1]
                if not np.isfinite(table[i, : n - 1]).all():
                    raise ValueError(
                        f"{data.path}: {name} of row {row} is not a finite number: the model overflows in this "
                        "precision (try --dtype float32), or its weights are damaged"
                    )
    return values


def _put_in_place(data: PreparedData, folder: Path, plan: _Plan, record: dict[str, Any], options: ScoreOptions) -> None:
    every = windows(data.lengths)
    missing = [window for window in every if not _part(folder, window).exists()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(every)} parts are missing: every process must see the same folder"
        )
    names = list(plan.scored)
    for name in plan.wanted:
        rows = _rows_of(data, folder, every, names.index(name))
        write_column(data, name, rows, column_record(record, options.columns[name]))
    shutil.rmtree(folder)


def _rows_of(data: PreparedData, folder: Path, every: list[tuple[int, int]], column: int) -> Iterator[np.ndarray]:
    for begin, end in every:
        values = np.load(_part(folder, (begin, end)), mmap_mode="r")[column]
        yield from np.split(values, np.cumsum(data.lengths[begin:end])[:-1])


def _part(folder: Path, window: tuple[int, int]) -> Path:
    return folder / f"rows-{window[0]:010d}-{window[1]:010d}.npy"
