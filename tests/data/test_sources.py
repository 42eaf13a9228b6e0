"""Inputs as batches of raw rows: what is opened, in which order, and errors that name the place."""

import gzip
import io
import json
import pickle
import re

import pytest

from eaft_megatron.data import jsonl, open_sources
from eaft_megatron.data.sources import parse

ROWS = [{"text": "a"}, {"text": "é\u2028"}, {"text": "c" * 50}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def rows_of(inputs, size=2, **options):
    """(where, row) of every row, as the pipeline reads them: batches, pickled on their way to another process."""
    found = []
    for source in open_sources([str(name) for name in inputs], **options):
        for batch in source.batches(size):
            assert 1 <= len(batch) <= size
            found += [(where, parse(raw, where)) for where, raw in pickle.loads(pickle.dumps(batch))]
    return found


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def make(path):
    """The file of ROWS that the name asks for."""
    if path.suffix == ".parquet":
        write_parquet(path, ROWS)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    else:
        path.write_text(LINES if path.suffix == ".jsonl" else json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_files(tmp_path, name):
    """Every format gives the same rows, numbered from 1, and a fingerprint of the bytes."""
    path = make(tmp_path / name)
    expected = [(f"{path}:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert rows_of([path]) == expected
    [source] = open_sources([str(path)])
    assert source.name == str(path)
    sizes = {"a.jsonl": (len(LINES.encode()), None), "a.jsonl.gz": (None, None), "a.parquet": (None, 3)}
    assert (source.n_bytes, source.n_rows) == sizes.get(name, (path.stat().st_size, None))
    before = source.fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", before)
    path.write_bytes(path.read_bytes() + b" ")
    assert source.fingerprint() != before


def test_json_lines_in_a_json_file_blank_lines_and_bom(tmp_path):
    """A .json file that does not begin with an array is read as JSON Lines; blank lines count and give None."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}')
    assert rows_of([path]) == [(f"{path}:1", {"a": 1}), (f"{path}:2", None), (f"{path}:3", {"a": 2})]


def test_folders_and_patterns_in_order_of_names(tmp_path):
    """Files of a folder and its folders; hidden and unknown files are left out of a folder."""
    for name in ("b.jsonl", "sub/a.jsonl", "a.jsonl.gz", ".hidden/x.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
    names = [source.name for source in open_sources([str(tmp_path)])]
    assert names == [str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl", "sub/a.jsonl")]
    assert [source.name for source in open_sources([f"{tmp_path}/*.jsonl"])] == [str(tmp_path / "b.jsonl")]
    twice = open_sources([str(tmp_path / "b.jsonl"), f"{tmp_path}/**/a.jsonl"])
    assert [source.name for source in twice] == [str(tmp_path / "b.jsonl"), str(tmp_path / "sub/a.jsonl")]


def test_nulls_that_arrow_adds_are_removed(tmp_path):
    """Nested objects get back the keys they were written with; a null column stays."""
    path = tmp_path / "a.parquet"
    rows = [{"x": None, "m": [{"a": 1}, {"b": {"c": 2}}]}, {"x": 1, "m": [{"b": {"d": [3]}}]}]
    write_parquet(path, rows)
    assert [row for _, row in rows_of([path])] == rows


def test_parquet_is_read_in_bounded_memory(tmp_path):
    """A row group behind the reader is given back: what is held does not grow with the file."""
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    rows = [{"text": f"{i:05d}" * 200} for i in range(20_000)]
    write_parquet(path, rows, row_group_size=500, use_dictionary=False, compression="none")
    [source] = open_sources([str(path)])
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in source.batches(500)]
    assert max(held) < 5_000_000 < path.stat().st_size / 3


def test_saved_datasets_and_dataset_folders(tmp_path):
    """save_to_disk, a dictionary of splits, and a folder of files opened as a dataset by --split."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "files").mkdir()
    make(tmp_path / "files" / "train.jsonl")
    assert [row for _, row in rows_of([tmp_path / "one"])] == ROWS
    assert rows_of([tmp_path / "two"], split="test") == [(f"{tmp_path}/two:1", ROWS[2])]
    [source] = open_sources([str(tmp_path / "one")])
    assert (source.n_rows, source.fingerprint()) == (3, open_sources([str(tmp_path / "one")])[0].fingerprint())
    splits = [open_sources([str(tmp_path / "two")], split=split)[0].fingerprint() for split in ("train", "test")]
    assert splits[0] != splits[1]
    with pytest.raises(ValueError, match="several splits; choose one of train, test with --dataset-split"):
        open_sources([str(tmp_path / "two")])
    with pytest.raises(ValueError, match="no split 'x'; choose one of train, test with --dataset-split"):
        open_sources([str(tmp_path / "two")], split="x")


def test_folder_opened_as_a_dataset(tmp_path, monkeypatch):
    """With --split, `datasets` reads the folder; its fingerprint does not depend on the cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    make(folder / "train.jsonl")
    assert [row for _, row in rows_of([folder], split="train")] == ROWS
    first = open_sources([str(folder)], split="train")[0].fingerprint()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    assert open_sources([str(folder)], split="train")[0].fingerprint() == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", ": unknown extension; known are .jsonl, .jsonl.gz, .json, .parquet"),
        ("a.jsonl", b"", ": the file holds no rows"),
        ("a.jsonl", b"\n \n", ": the file holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1', ":2: broken JSON, column 8: "),
        ("a.jsonl", b"\n[1]", ":2: expected a JSON object, found list"),
        ("a.jsonl", b"null", ":1: expected a JSON object, found NoneType"),
        ("a.jsonl", b'{"a": "\xff"}', ":1: not UTF-8"),
        ("a.jsonl.gz", b"no gzip", ": broken gzip: "),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], ": broken gzip: "),  # named alike in every process
        ("a.parquet", b"no parquet", ": not a Parquet file: "),
        ("a.json", b"[]", ": the file holds no rows"),
        ("a.json", b'[{"a": 1}, 3]', ":2: expected a JSON object, found int"),
        ("a.json", b'[{"a": 1}, {"a" 2}]', ":2: broken JSON: Expecting ':' delimiter"),
        ("a.json", b'[{"a": 1}, {"a": 2', ":2: broken JSON: "),
        ("a.json", b'[{"a": 1}', ":1: broken JSON: the array has no end"),
        ("a.json", b'[{"a": 1}] x', ":1: broken JSON: expected ',' between elements"),
        ("a.json", b'[{"a": "\xff"}]', ":1: not UTF-8"),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, message):
    """Each broken file is a ValueError with the file, and the row where there is one."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        rows_of([path])


def test_missing_inputs(tmp_path, monkeypatch):
    """What looks like a path is a missing file; a pattern without match and an empty folder say so."""
    for name in (tmp_path / "a.jsonl", "./nothing", "a/b/c", "x.parquet", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{name}: no such file")):
            open_sources([str(name)])
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_sources([f"{tmp_path}/*.jsonl"])
    with pytest.raises(ValueError, match="holds no file with a known extension"):
        open_sources([str(tmp_path)])
    with pytest.raises(ValueError, match="--input names no file"):
        open_sources([])


def test_dataset_that_cannot_be_loaded(monkeypatch):
    """Whatever `datasets` raises becomes one clear error."""
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="--input who/what: no such file or folder, and datasets cannot load it: Conn"):
        open_sources(["who/what"])


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
def test_json_arrays_in_pieces(monkeypatch, piece):
    """Wherever a piece of text ends, the elements are the same."""
    monkeypatch.setattr(jsonl, "_PIECE", piece)
    elements = [{"a": 'x,]\\"é🙂' * 9, "b": [1, {"c": None}]}, 12, -1.5e3, "s", True, [[]], {}]
    text = json.dumps(elements, indent=2) + "\n"
    for encoded in (text, json.dumps(elements, ensure_ascii=False), "\ufeff" + text):
        found = list(jsonl.iter_json_array(io.BytesIO(encoded.encode()), "f"))
        assert [(number, json.loads(raw)) for number, raw in found] == list(enumerate(elements, start=1))
    assert list(jsonl.iter_json_array(io.BytesIO(b" [ ] "), "f")) == []


def test_an_element_that_is_too_long_is_refused(monkeypatch):
    """A string without an end does not fill the memory with the rest of the file."""
    monkeypatch.setattr(jsonl, "_PIECE", 8)
    monkeypatch.setattr(jsonl, "_LONGEST", 64)
    file = io.BytesIO(b'[{"a": "' + b"x" * 100_000)
    with pytest.raises(ValueError, match="f:1: broken JSON: Unterminated string"):
        list(jsonl.iter_json_array(file, "f"))
    broken = io.BytesIO(b'[{"a" 1}, ' + b"x" * 100_000)
    with pytest.raises(ValueError, match="f:1: broken JSON: Expecting ':' delimiter"):
        list(jsonl.iter_json_array(broken, "f"))
