"""Files and folders that are whole or not there, whatever kills the process. The standard library alone."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """A name beside ``path``, with its suffix, to write a file to; the file takes the name ``path`` at the end.

    Readers see the file of before or the one of after. An error in the block leaves that of before.

    Args:
        path: of the file, in a folder that exists.
        durable: have it on the disk when the block is left, so that not even a power cut takes it back.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.incomplete-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent)


def write_text(path: str | os.PathLike, text: str, *, mode: int | None = None, durable: bool = False) -> None:
    """Write UTF-8 as :func:`replacing` does; ``mode``: its permissions, by default those of any new file."""
    with replacing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")
        if mode is not None:
            partial.chmod(mode)


def write_json(path: str | os.PathLike, value: Any, *, durable: bool = False) -> None:
    """Write indented JSON with a newline at its end as :func:`replacing` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=durable)


def incomplete_folder(final: Path, mark: str) -> Path:
    """Where files go until they are all there: a hidden folder beside ``final``, on the same file system."""
    return final.parent / f".{final.name}.incomplete-{mark}"


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write in, which takes the name ``final`` at the end; on an error nothing of it is left.

    Raises:
        OSError: ``final`` is there by then, and not empty.
    """
    folder = incomplete_folder(final, secrets.token_hex(4))
    folder.mkdir(parents=True)
    try:
        yield folder
        os.rename(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_folder(new: Path, final: Path) -> None:
    """Give ``new`` the name ``final``; what had it stays whole until then, and is removed afterwards."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
