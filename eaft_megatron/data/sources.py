"""Files, folders and `datasets` as one kind of source: batches of raw rows that know where they stand, never all."""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, cast

from eaft_megatron.data.jsonl import iter_json_array, iter_lines, parse_line

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_TABLE_ROWS = 256  # of a table that are Python objects at once
Raw = bytes | dict[str, Any]


class Source:
    """Rows of one input.

    `name`: what the user calls it. `n_bytes`, `n_rows`: its size, None where it is not known beforehand (of a text
    file the rows, of a compressed one both, of a table the bytes).
    """

    n_bytes: int | None = None
    n_rows: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprint(self) -> str:
        """64 hex digits that change when the rows may have changed."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[str, Raw]]:
        """(where, raw row) in order; `parse` makes a row of a raw one."""
        raise NotImplementedError

    def batches(self, size: int) -> Iterator[list[tuple[str, Raw]]]:
        """Lists of at most `size` raw rows, so that a batch can be parsed and encoded in another process.

        Raises:
            ValueError: the source holds no rows, or cannot be read on.
        """
        rows = self.rows()
        while batch := list(islice(rows, size)):
            yield batch


def parse(raw: Raw, where: str) -> dict[str, Any] | None:
    """A raw row of `Source.batches` as an object, or None for a blank line.

    Tables lose the None-valued keys of nested objects: Arrow fills every struct with the keys of all rows.

    Raises:
        ValueError: broken JSON, with `where` and the column.
    """
    if isinstance(raw, bytes):
        return parse_line(raw, where)
    return {key: _without_none(value) for key, value in raw.items()}


def open_sources(inputs: Sequence[str], *, split: str | None = None, config: str | None = None) -> list[Source]:
    """The sources that `inputs` name, in their order; a folder's or a pattern's files in the order of their names.

    An input is a file (`EXTENSIONS`), a pattern of files, a folder of files, a folder written by
    `datasets.save_to_disk`, or the name of a dataset for `datasets.load_dataset` (which keeps it on disk). `split`
    and `config` choose within datasets; with either, a folder of files is opened as a dataset, too.

    Raises:
        FileNotFoundError: a file, folder or pattern that matches nothing.
        ValueError: no inputs, an unknown extension, an empty file, a dataset that cannot be loaded.
    """
    if not inputs:
        raise ValueError("--input names no file")
    sources = [source for name in inputs for source in _open(str(name), split, config)]
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--input names {twice[0]} twice: every row of it would count twice")
    return sources


def _open(name: str, split: str | None, config: str | None) -> list[Source]:
    path = Path(name)
    if path.is_file():
        return [_open_file(path)]
    if path.is_dir():
        return _open_folder(path, split, config)
    if glob.has_magic(name):
        matches = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())
        if not matches:
            raise FileNotFoundError(f"--input {name}: no file matches")
        return [_open_file(Path(match)) for match in matches]
    if path.suffix in (".jsonl", ".gz", ".json", ".parquet") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such file")
    return [_load_dataset(name, split, config)]


def _open_file(path: Path) -> Source:
    if not path.name.endswith(EXTENSIONS):
        raise ValueError(f"{path}: unknown extension; known are {', '.join(EXTENSIONS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file holds no rows")
    return _ParquetSource(path) if path.suffix == ".parquet" else _JsonSource(path)


def _open_folder(path: Path, split: str | None, config: str | None) -> list[Source]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_load_from_disk(path, split)]
    if split is not None or config is not None:
        return [_load_dataset(str(path), split, config)]
    prepared = {manifest.parent for manifest in path.rglob("manifest.json") if (manifest.parent / "rows").is_dir()}
    files = sorted(
        file
        for file in path.rglob("*")
        if file.name.endswith(EXTENSIONS)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not prepared.intersection(file.parents)  # an output of ours, in the folder of its input
    )
    if not files:
        raise ValueError(f"{path}: the folder holds no file with a known extension ({', '.join(EXTENSIONS)})")
    return [_open_file(file) for file in files]


class _FileSource(Source):
    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def _open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


class _JsonSource(_FileSource):
    """JSON Lines, plain or gzip; or one JSON array, whose elements are numbered from 1 as lines are."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.n_bytes = None if path.suffix == ".gz" else path.stat().st_size

    def rows(self) -> Iterator[tuple[str, Raw]]:
        empty = True
        try:
            with _open_bytes(self.path) as file:
                array = self.path.suffix == ".json" and _starts_with_bracket(file)
                for number, raw in iter_json_array(file, self.name) if array else iter_lines(file):
                    empty = empty and not raw.strip()
                    yield f"{self.name}:{number}", raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name}: broken gzip: {error}") from error
        if empty:
            raise ValueError(f"{self.name}: the file holds no rows")


def _starts_with_bracket(file: Any) -> bool:
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start.startswith(b"[")


class _ParquetSource(_FileSource):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open() as file:
            self.n_rows = file.metadata.num_rows
        if self.n_rows == 0:
            raise ValueError(f"{path}: the file holds no rows")

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            # With pre_buffer, the default, pyarrow keeps every row group it has read.
            return parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{self.path}: not a Parquet file: {error}") from error

    def rows(self) -> Iterator[tuple[str, Raw]]:
        number = count(1)
        with self._open() as file:
            for batch in file.iter_batches(batch_size=_TABLE_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield f"{self.name}:{next(number)}", row


class _DatasetSource(Source):
    def __init__(self, name: str, dataset: Any, identity: list) -> None:
        super().__init__(name)
        self._dataset = dataset.with_format("arrow")
        self._identity = identity
        self.n_rows = len(dataset)
        if self.n_rows == 0:
            raise ValueError(f"{name}: the dataset holds no rows")

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()

    def rows(self) -> Iterator[tuple[str, Raw]]:
        number = count(1)
        for table in self._dataset.iter(batch_size=_TABLE_ROWS):
            for row in table.to_pylist():
                yield f"{self.name}:{next(number)}", row


def _load_from_disk(path: Path, split: str | None) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path}: not a folder of datasets.save_to_disk: {error}") from error
    dataset, chosen = _choose_split(str(path), loaded, split)
    return _DatasetSource(str(path), dataset, [str(path), chosen, dataset._fingerprint])


def _load_dataset(name: str, split: str | None, config: str | None) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # offline, unknown, gated, or with a loading script: each its own class
        raise ValueError(
            f"--input {name}: no such file or folder, and datasets cannot load it: {type(error).__name__}: {error}"
        ) from error
    dataset, chosen = _choose_split(name, loaded, split)
    # The addresses of a dataset's files name the revision; a fingerprint of the cache would change with its age.
    checksums = dataset.info.download_checksums or {}
    revision = sorted([str(key), str(value)] for key, value in checksums.items()) or dataset._fingerprint
    return _DatasetSource(name, dataset, [name, config, chosen, revision, len(dataset)])


def _choose_split(name: str, loaded: Any, split: str | None) -> tuple[Any, str | None]:
    if not isinstance(loaded, dict):
        return loaded, split
    chosen = split if split is not None else next(iter(loaded)) if len(loaded) == 1 else None
    if chosen not in loaded:
        wanted = f"no split {split!r}" if split else "several splits"
        raise ValueError(f"--input {name}: {wanted}; choose one of {', '.join(loaded)} with --dataset-split")
    return loaded[chosen], chosen


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
