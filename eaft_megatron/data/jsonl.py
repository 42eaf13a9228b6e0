"""JSON Lines, one object a line, with errors that name the file and the line."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

_BLANKS = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20  # characters
_LONGEST = 1 << 28


def parse_line(raw: bytes, where: str) -> dict[str, Any] | None:
    """One line as an object, or None for a blank line; `where` (file:line) begins every error.

    Raises:
        ValueError: not UTF-8, not JSON, or JSON that is not an object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}: broken JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def iter_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line), a byte-order mark taken off the first.

    Bytes, because text mode would also break lines at a lone \\r and lose the line number of a decoding error.
    """
    for number, raw in enumerate(file, start=1):
        yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def iter_json_array(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, element as UTF-8 JSON) of a file that is one JSON array, reading it piece by piece.

    Memory holds one element and a piece of text; an element of more than 256 Mi characters is refused.

    Raises:
        ValueError: not UTF-8, not a JSON array, or an element that is broken or too long (its number is named).
    """
    text = _ArrayText(file)
    number = 1
    try:
        if text.take() != "[":
            raise ValueError("expected '['")
        if text.peek() != "]":
            yield number, text.element().encode()
            while text.peek() == ",":
                text.take()
                number += 1
                yield number, text.element().encode()
        if text.take() != "]" or text.peek():
            raise ValueError("expected ',' between elements and one ']' at the end of the file")
    except UnicodeError as error:
        raise ValueError(f"{name}:{number}: not UTF-8 ({error})") from None
    except ValueError as error:
        raise ValueError(f"{name}:{number}: broken JSON: {error}") from None


class _ArrayText:
    """A text file read piece by piece, what is behind thrown away."""

    def __init__(self, file: IO[bytes]) -> None:
        self._reader = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not blank, "" at the end of the file."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            self._at = self._at if blanks is None else blanks.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(_PIECE):
                return ""

    def take(self) -> str:
        """`peek`, and go behind it."""
        character = self.peek()
        self._at += len(character)
        return character

    def element(self) -> str:
        """The JSON value that begins at the next character."""
        self.peek()
        size = _PIECE
        while True:
            try:
                _, stop = self._decode(self._text, self._at)
                problem = "the array has no end"
            except json.JSONDecodeError as error:
                # Text that is only cut off fails at its end, but for a string, which fails at its beginning.
                if error.pos < len(self._text) - 16 and not error.msg.startswith("Unterminated string"):
                    raise
                stop, problem = len(self._text), str(error)
            if stop < len(self._text):  # else a number might go on
                value, self._at = self._text[self._at : stop], stop
                return value
            if stop - self._at > _LONGEST or not self._read(size):
                raise ValueError(problem)
            size *= 2

    def _read(self, size: int) -> bool:
        piece = self._reader.read(size)
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
