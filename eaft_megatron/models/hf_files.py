"""The safetensors files of a Hugging Face folder: which tensors, where, and slices of them without reading the rest."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # dtype -> bytes


class HFTensors:
    """Tensors by name over all files of a folder; a context manager (it keeps the files mapped).

    `tensors[name]` is a safetensors slice: ranges of it are read from disk when indexed.

    Raises:
        ValueError: no safetensors in the folder, a file that is missing, damaged or contradicted by the index.
    """

    def __init__(self, folder: str | Path, files: list[Path] | None = None) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}
        self.file_of: dict[str, Path] = {}
        index = {} if files is not None else _read_index(self.folder)
        try:
            for path in files if files is not None else _files(self.folder, index):
                self._open(path)
            for name, file in index.items():
                if self.file_of.get(name) != self.folder / file:
                    raise ValueError(f"{self.folder / INDEX} says that {name} is in {file}, but it is not there")
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"{path} is missing, though {INDEX} names it")
        try:
            handle = self._stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}): fetch it again") from error
        self._handles[path] = handle
        for name in handle.keys():  # noqa: SIM118  a safe_open handle is not iterable
            if name in self.file_of:
                raise ValueError(f"{name} is in two files, {self.file_of[name]} and {path}")
            self.file_of[name] = path

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Any:
        return self._handles[self.file_of[name]].get_slice(name)

    def bytes(self) -> int:
        """Of all tensors together, headers left out."""
        slices = [self[name] for name in self.file_of]
        return sum(math.prod(part.get_shape()) * _FLOATS[part.get_dtype()] for part in slices)

    def check(self, expected: dict[str, list[int]]) -> None:
        """ValueError, naming tensor and file, unless the folder holds exactly the expected names and shapes."""
        for name, shape in expected.items():
            if name not in self.file_of:
                raise ValueError(f"tensor {name} is missing from {self._where()}")
            tensor = self[name]
            if list(tensor.get_shape()) != shape:
                have = list(tensor.get_shape())
                raise ValueError(f"tensor {name} in {self.file_of[name]} has shape {have}, the model needs {shape}")
            if tensor.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"tensor {name} in {self.file_of[name]} has dtype {tensor.get_dtype()}: give the folder of the "
                    f"unquantised model ({', '.join(_FLOATS)})"
                )
        for name, path in self.file_of.items():
            # A buffer that old transformers versions saved; it is computed, never loaded.
            if name not in expected and not name.endswith(".rotary_emb.inv_freq"):
                raise ValueError(_unused(name, path))

    def _where(self) -> str:
        files = sorted(str(path) for path in self._handles)
        return files[0] if len(files) == 1 else f"{self.folder} ({len(files)} safetensors files)"


def _unused(name: str, path: Path) -> str:
    hint = ""
    if name == "lm_head.weight":
        hint = ' (config.json says "tie_word_embeddings": remove the tensor, or set that field to false)'
    return f"tensor {name} in {path} has no place in the model{hint}"


def _read_index(folder: Path) -> dict[str, str]:
    """weight_map of the index file; empty where the folder has none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error


def _files(folder: Path, index: dict[str, str]) -> list[Path]:
    if index:
        return [folder / name for name in sorted(set(index.values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors are read "
        "(save_pretrained of transformers writes them)"
    )
