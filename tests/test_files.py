"""Files are whole or not there, whatever happens on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eaft_megatron.checkpoint_files import TRACKER, iteration_name, newest_checkpoint
from eaft_megatron.files import new_folder, replace_folder, replacing, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]


def test_an_error_leaves_the_file_of_before(tmp_path):
    """What fails half-way leaves the old content and nothing beside it."""
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_every_picture_replaces_the_one_before():
    """No picture is drawn into the file that readers open: what is saved is the name that `replacing` gave."""
    saved = []
    for path in [*(ROOT / "eaft_megatron").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        saved += [(path.name, lines[i - 1].strip(), line) for i, line in enumerate(lines) if ".savefig(" in line]
    assert len(saved) >= 6
    for name, before, line in saved:
        assert before == "with replacing(path) as partial:" and ".savefig(partial" in line, name


def test_a_killed_writer_leaves_the_file_of_before(tmp_path):
    """SIGKILL between writing and renaming: readers still see the old content."""
    write_text(tmp_path / "a.png", "old")
    code = (
        "import os, signal, sys\nfrom eaft_megatron.files import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n"
        "    assert partial.suffix == '.png'\n"
        "    partial.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")]).returncode == -9
    assert (tmp_path / "a.png").read_text() == "old"


@pytest.mark.parametrize("durable", [False, True])
def test_content_and_permissions(tmp_path, durable):
    """The new content is there, with the permissions that were asked for."""
    write_text(tmp_path / "run.sh", "ä", mode=0o755, durable=durable)
    assert (tmp_path / "run.sh").read_text(encoding="utf-8") == "ä"
    assert (tmp_path / "run.sh").stat().st_mode & 0o777 == 0o755
    write_json(tmp_path / "run.json", {"a": "ä"}, durable=durable)
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == '{\n  "a": "ä"\n}\n'


def test_a_folder_takes_its_name_at_the_end(tmp_path):
    """Until then nothing has the name; after an error nothing is left; a filled folder is not replaced."""
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    with pytest.raises(OSError), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("2")
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    """The successor's files alone are there."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"] and os.listdir(tmp_path / "old") == ["new"]


@pytest.mark.parametrize(("text", "expected"), [("7\n", "iter_0000007"), ("release", "release"), (None, None)])
def test_the_tracker_names_a_checkpoint(tmp_path, text, expected):
    """An iteration, weights alone, or nothing yet."""
    if text is not None:
        (tmp_path / TRACKER).write_text(text)
    assert newest_checkpoint(tmp_path) == expected
    assert iteration_name(7) == "iter_0000007"


@pytest.mark.parametrize("text", ["", "latest", "-1", "7.0"])
def test_a_broken_tracker_is_named(tmp_path, text):
    """What is neither is an error that names the file."""
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(ValueError, match=f"{TRACKER} holds"):
        newest_checkpoint(tmp_path)
