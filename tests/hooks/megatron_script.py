"""Megatron-LM's own pretrain_gpt.py on CPU: releases out of a clone, runs, and what they print."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eaft_megatron.ranks import free_port

CLONE = os.environ.get("MEGATRON_LM_PATH")
TAGS = os.environ.get("MEGATRON_LM_TAGS", "core_v0.16.1 core_v0.19.0").split()
needs_clone = [
    pytest.mark.skipif(not CLONE, reason="MEGATRON_LM_PATH does not name a clone of NVIDIA/Megatron-LM"),
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Megatron-LM's training loop imports triton"),
]
REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB = 96  # NullTokenizer's 95 and one more

MODEL = (  # noqa: SIM905
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --vocab-size 95 --tokenizer-type NullTokenizer "
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion "
    "--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion --attention-softmax-in-fp32 "
    "--mock-data --split 90,5,5 --num-workers 0 --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 "
    "--lr-decay-style constant --seed 7 --log-interval 1 --eval-iters 1 --eval-interval 100 "
    "--calculate-per-token-loss --ckpt-format torch_dist"
).split()

# What ``eaft_megatron.run --device cpu`` does, without us.
PLAIN = """
import runpy, sys
from eaft_megatron.testing.cpu_script import script_standins

sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
with script_standins():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

_OVERRIDE = """
import typing

if not hasattr(typing, "override"):  # Python 3.11 under Megatron-LM 0.18 and later
    typing.override = lambda method: method
"""


def checkout(clone: str, tag: str, folder: Path) -> Path:
    """The tag's files under ``folder``; returns its pretrain_gpt.py."""
    tree = folder / tag
    if not tree.exists():
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", clone, "archive", tag], check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", str(tree)], input=archive, check=True)
        (tree / "sitecustomize.py").write_text(_OVERRIDE)
    return tree / "pretrain_gpt.py"


def command(
    script: Path,
    flags: list[str],
    *,
    tp: int = 1,
    pp: int = 1,
    processes: int = 1,
    hooked: bool = True,
) -> list[str]:
    """torchrun of the script through ``eaft_megatron.run``, or without us."""
    runner = ["-m", "eaft_megatron.run", "--device", "cpu"] if hooked else ["--no-python", sys.executable, "-c", PLAIN]
    layout = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", free_port()]
    return [sys.executable, *torchrun, *runner, str(script), *MODEL, *layout, *flags]


def environment(script: Path) -> dict[str, str]:
    """OMP_NUM_THREADS=1, and ours and the release's folder where Python looks, in its checkpoint writers too."""
    paths = [str(script.parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def run(script: Path, flags: list[str], **layout: int | bool) -> str:
    """What the run printed; AssertionError with its end if it failed."""
    done = subprocess.run(
        command(script, flags, **layout), env=environment(script), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def reported(output: str) -> list[dict[str, str]]:
    """One dict of printed values for each iteration, without times."""
    rows = []
    for line in re.findall(r"iteration +\d+/ +\d+ \|.*", output):
        fields = dict(re.findall(r"\| +([a-z0-9_ ]+): +(\S+)", line[line.index("|") :]))
        rows.append({name: value for name, value in fields.items() if "time" not in name})
    return rows
