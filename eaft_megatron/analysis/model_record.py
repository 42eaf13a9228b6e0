"""Which model made a column: enough to know it again, without reading every weight."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SAMPLE = 4096  # bytes read of a tensor at its beginning, middle and end


def model_record(folder: str | Path) -> dict[str, str]:
    """``name``, ``config_sha256`` and ``weights_fingerprint`` of a Hugging Face folder.

    The fingerprint is a SHA-256 over the name and size of every weight file and over 4 KiB from the beginning, the
    middle and the end of every tensor: milliseconds for any model, and different wherever training has touched a
    tensor as a whole. A change of a few numbers inside a tensor can escape it. How the weights are cut into files
    matters, where the folder lies does not.

    Raises:
        ValueError: not a folder with config.json and weights.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a Hugging Face model folder (no config.json): give a local folder; `hf download` makes "
            "one of a model on the hub"
        )
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors)")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for begin, end in _tensors(file, path):
                for start in sorted({begin, max((begin + end) // 2, begin), max(end - _SAMPLE, begin)}):
                    file.seek(start)
                    digest.update(file.read(min(_SAMPLE, end - start)))
    config = (folder / "config.json").read_bytes()
    return {
        "name": str(folder),
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "weights_fingerprint": digest.hexdigest(),
    }


def _tensors(file: Any, path: Path) -> Iterator[tuple[int, int]]:
    """Where each tensor lies in the file: (begin, end) in bytes. Another format counts as 256 equal pieces."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        edges = [size * i // 256 for i in range(257)]
        yield from zip(edges[:-1], edges[1:], strict=True)
        return
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): fetch it again") from error
    yield 0, 8 + length
    for name in sorted(header):
        if name != "__metadata__":
            begin, end = header[name]["data_offsets"]
            yield 8 + length + begin, 8 + length + end
