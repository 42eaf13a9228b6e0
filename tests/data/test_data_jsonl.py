"""Reading JSON Lines: what is accepted, and errors that name file and line."""

import re

import pytest

from eaft_megatron.data import iter_jsonl, read_jsonl


def test_blank_lines_bom_and_missing_final_newline(tmp_path):
    """All accepted; line numbers count blank lines; U+2028 does not break a line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n' + '{"b": "é\u2028"}'.encode())
    assert list(iter_jsonl(path)) == [(1, {"a": 1}), (4, {"b": "é\u2028"})]
    assert read_jsonl(str(path)) == [{"a": 1}, {"b": "é\u2028"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": the file holds no rows"),
        (b"\n \n", ": the file holds no rows"),
        (b'{"a": 1}\n{"a": 1', ":2: broken JSON, column 8: "),
        (b'{"a": 1}\n\n[1]\n', ":3: expected a JSON object, found list"),
        (b"null", ":1: expected a JSON object, found NoneType"),
        (b'{"a": 1}\n\xff\n', ":2: not UTF-8"),
    ],
)
def test_errors_name_file_and_line(tmp_path, content, message):
    """Each broken file gives a ValueError with the place."""
    path = tmp_path / "b.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        read_jsonl(path)


def test_missing_file(tmp_path):
    """A missing file, or a folder in its place, is a FileNotFoundError with the path."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: no such file")):
            read_jsonl(path)
