"""patches/ without a clone of Megatron-LM; with one, the patches and the wrapper's hold on nine releases."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eaft_megatron.hooks

CLONE = os.environ.get("MEGATRON_LM_PATH")
ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"
NAMES = [patch.stem for patch in sorted(PATCHES.glob("*.patch"))]
TABLE = dict(re.findall(r"^\| `(\S+)\.patch` \| `([0-9a-f]{40})` \|", (PATCHES / "README.md").read_text(), re.M))
RELEASES = [
    *("core_v0.12.3", "core_v0.13.1", "core_v0.14.0", "core_v0.15.3", "core_v0.16.1", "core_v0.17.1"),
    *("core_v0.18.2", "core_v0.19.0", "main"),
]
needs_clone = pytest.mark.skipif(not CLONE, reason="MEGATRON_LM_PATH does not name a clone of NVIDIA/Megatron-LM")


# ---- without a clone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_patch_adds_only_calls_of_ours(name):
    """Two files; nothing is removed; what is added imports one public name of ours, and calls it."""
    patch = PATCHES / f"{name}.patch"
    stat = subprocess.run(["git", "apply", "--numstat", str(patch)], check=True, capture_output=True, text=True)
    counts = [line.split("\t") for line in stat.stdout.splitlines()]
    assert counts == [["3", "0", "megatron/training/arguments.py"], ["3", "0", "megatron/training/training.py"]]
    added = [line[1:] for line in patch.read_text().splitlines() if line.startswith("+") and line[1:2] != "+"]
    names = [match[1] for line in added if (match := re.fullmatch(r"    from eaft_megatron\.hooks import (\w+)", line))]
    assert names == ["add_eaft_arguments", "attach"]
    assert all(callable(getattr(eaft_megatron.hooks, public)) for public in names)
    assert [line for line in added if line and " import " not in line] == [
        "    parser = add_eaft_arguments(parser)",
        "    forward_step_func = attach(args, forward_step_func)",
    ]


def test_readme_lists_each_patch():
    assert sorted(TABLE) == NAMES == ["core_v0.14.0", "core_v0.15.3", "core_v0.16.1", "core_v0.19.0", "main"]


def _check(clone: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(PATCHES / "check.sh"), str(clone)], capture_output=True, text=True)


def test_check_names_what_is_missing_and_what_does_not_apply(tmp_path):
    """A repository with one release's tag, on files that are not Megatron-LM's."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "--message", "empty")
    git("tag", "core_v0.16.1")
    result = _check(tmp_path)
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert result.returncode == 1 and sorted(rows) == sorted([*NAMES, "release"])
    assert "DOES NOT APPLY" in rows["core_v0.16.1"]
    assert "MISSING: the clone has no refs/tags/core_v0.19.0" in rows["core_v0.19.0"]
    assert f"MISSING: the clone has no {TABLE['main']}" in rows["main"]


def test_check_refuses_what_is_no_clone(tmp_path):
    result = _check(tmp_path / "nothing")
    assert result.returncode == 2 and "is not a git clone" in result.stderr


# ---- with a clone --------------------------------------------------------------------------------------------------


@needs_clone
def test_patches_apply():
    """On the commits that the README names."""
    result = _check(CLONE)
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert result.returncode == 0, result.stdout + result.stderr
    assert rows == [[name, TABLE[name][:12], "applies"] for name in NAMES]


@needs_clone
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_wrapper_binds(release, tmp_path):
    """The release's own modules: flags parse, the hook binds, uninstalling puts everything back."""
    commit = TABLE["main"] if release == "main" else release
    archive = subprocess.run(["git", "-C", CLONE, "archive", commit, "megatron"], check=True, capture_output=True)
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.hooks.bind_release"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    if "No module named 'triton'" in result.stderr:
        pytest.skip(f"{release} imports triton, which is not installed")
    assert result.returncode == 0, result.stderr[-4000:]
