"""JSON Lines, one object a line, with errors that name the file and the line."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any


def iter_jsonl(path: str | PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line that is not blank.

    A UTF-8 byte-order mark and a missing newline at the end are accepted.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: a line is not UTF-8, not JSON or not a JSON object; or the file has no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    empty = True
    # Read as bytes: text mode would also break lines at a lone \r and lose the line number of a decoding error.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            row = _parse(path, number, raw)
            if row is not None:
                empty = False
                yield number, row
    if empty:
        raise ValueError(f"{path}: the file holds no rows")


def read_jsonl(path: str | PathLike) -> list[dict[str, Any]]:
    """The rows of `path` in order; errors as in `iter_jsonl`."""
    return [row for _, row in iter_jsonl(path)]


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any] | None:
    """One line as an object, or None for a blank line."""
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: broken JSON, column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
    return row
