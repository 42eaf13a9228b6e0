"""The names in a folder of checkpoints: Megatron's, and what `eaft-megatron convert` records beside them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""Names the newest checkpoint: an iteration, or "release" for weights alone."""
RECORD = "eaft_model.json"
"""The model's flags, true vocabulary and types."""
HF_SUBFOLDER = "hf"
"""config.json and tokenizer of the model."""
RELEASE = "release"
"""The folder of weights alone."""


def iteration_name(iteration: int) -> str:
    """The folder of an iteration's checkpoint."""
    return f"iter_{iteration:07d}"


def iteration_of(name: str) -> int:
    """The iteration of a folder that :func:`iteration_name` named."""
    return int(name.removeprefix("iter_"))


def newest_checkpoint(root: str | Path) -> str | None:
    """The folder in ``root`` that the tracker names; None where there is no tracker.

    Raises:
        ValueError: the tracker holds neither an iteration nor "release".
    """
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if text != RELEASE and not text.isdigit():
        raise ValueError(f"{tracker} holds {text!r}, neither an iteration nor {RELEASE}")
    return text if text == RELEASE else iteration_name(int(text))


def is_whole(checkpoint: Path) -> bool:
    """Whether this is a complete torch_dist checkpoint: its ``.metadata`` is written last."""
    return (checkpoint / ".metadata").is_file()


def drop_old(root: str | Path, keep_last: int) -> list[int]:
    """Delete the checkpoints in ``root`` but for the newest ``keep_last``, counted from the one the tracker names.

    What is newer than that (being written), what is no iteration's folder, and links stay.

    Returns:
        The iterations that were deleted, oldest first.

    Raises:
        ValueError: ``keep_last`` < 1, or the tracker cannot be read.
    """
    if keep_last < 1:
        raise ValueError(f"--save-keep-last must be >= 1, got {keep_last}")
    newest = newest_checkpoint(root)
    if newest in (None, RELEASE):
        return []
    folders = [path for path in Path(root).iterdir() if re.fullmatch(r"iter_\d{7,}", path.name)]
    folders = [path for path in folders if path.is_dir() and not path.is_symlink()]
    kept_from = iteration_of(newest)
    saved = sorted((path for path in folders if iteration_of(path.name) <= kept_from), key=lambda path: path.name)
    dropped = saved[:-keep_last]
    for path in dropped:
        (path / ".metadata").unlink(missing_ok=True)  # first: what is half deleted must not look whole
        shutil.rmtree(path)
    return [iteration_of(path.name) for path in dropped]
