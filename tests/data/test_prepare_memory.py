"""`prepare` holds a few batches in memory, never the input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("datasets")

from tests.data.conftest import build_tokenizer

_MEASURE = """
import resource, sys
from eaft_megatron.cli import main

assert main(sys.argv[1:]) == 0
usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("peak", max(usages) // 1024)
"""


def _peak(folder, mebibytes: int, workers: int) -> int:
    """MiB at the peak of the largest process, preparing a file of that size."""
    source = folder / f"{mebibytes}.jsonl"
    answer = "All work and no play makes Jack a dull boy. " * 100
    messages = [{"role": "user", "content": "Write."}, {"role": "assistant", "content": answer}]
    line = json.dumps({"messages": messages}) + "\n"
    with source.open("w") as file:
        for _ in range(mebibytes * 2**20 // len(line)):
            file.write(line)
    flags = ["prepare", "--input", str(source), "--tokenizer", str(folder / "tokenizer"), "--seq-length", "8192"]
    flags += ["--output", str(folder / f"out{mebibytes}"), "--num-workers", str(workers)]
    command = [sys.executable, "-c", _MEASURE, *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Eight times the input, at most 15 MiB more."""
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    small, large = _peak(tmp_path, 3, 2), _peak(tmp_path, 24, 2)
    print(f"peak MiB: {small} for 3 MiB of input, {large} for 24 MiB")
    assert large < small + 15
