"""Which checkpoints are kept."""

from __future__ import annotations

import pytest

from eaft_megatron.checkpoint_files import TRACKER, drop_old


def _checkpoints(root, *names: str) -> None:
    for name in names:
        (root / name).mkdir()
        (root / name / ".metadata").touch()
        (root / name / "shard").write_text("numbers")


def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    """Counted from the tracker's: one that is being written, weights alone, links and strangers stay."""
    _checkpoints(tmp_path, *(f"iter_{n:07d}" for n in (10, 20, 30, 40, 50)), "release", "iter_best", "hf")
    (tmp_path / "iter_0000005").symlink_to(tmp_path / "hf", target_is_directory=True)
    (tmp_path / TRACKER).write_text("40\n")
    assert drop_old(tmp_path, 2) == [10, 20]
    expected = ["hf", "iter_0000005", "iter_0000030", "iter_0000040", "iter_0000050", "iter_best", TRACKER, "release"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
    assert drop_old(tmp_path, 2) == []


def test_without_a_tracker_nothing_is_deleted(tmp_path):
    """Nothing is known to be safe yet; "release" names no iteration; a broken tracker is an error."""
    _checkpoints(tmp_path, "iter_0000001", "iter_0000002")
    assert drop_old(tmp_path, 1) == []
    (tmp_path / TRACKER).write_text("release")
    assert drop_old(tmp_path, 1) == []
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(ValueError, match="neither an iteration nor release"):
        drop_old(tmp_path, 1)
    with pytest.raises(ValueError, match="--save-keep-last must be >= 1, got 0"):
        drop_old(tmp_path, 0)
