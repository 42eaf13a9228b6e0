"""Megatron-LM's untouched pretrain_gpt.py under ``eaft_megatron.run --device cpu``. Needs a clone of Megatron-LM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.hooks.megatron_script import CLONE, TAGS, VOCAB, checkout, command, environment, needs_clone, reported, run

EAFT = ["--loss-type", "eaft", "--true-vocab-size", str(VOCAB)]
pytestmark = [pytest.mark.slow, *needs_clone]

LAYOUTS = {
    "tp2": (dict(tp=2, processes=2), []),
    "pp2": (dict(pp=2, processes=2), []),
    "tp2 pp2": (dict(tp=2, pp=2, processes=4), []),
    "tp2 sequence parallel": (dict(tp=2, processes=2), ["--sequence-parallel"]),
    "pp2 interleaved": (dict(pp=2, processes=2), ["--num-layers-per-virtual-pipeline-stage", "1"]),
    "recompute": (
        dict(),
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "dp2 distributed optimizer": (dict(processes=2), ["--use-distributed-optimizer"]),
    "linear": (dict(), ["--eaft-linear-chunk", "20"]),
    "linear tp2 sequence parallel": (dict(tp=2, processes=2), ["--sequence-parallel", "--eaft-linear-chunk", "20"]),
    "linear pp2": (dict(pp=2, processes=2), ["--eaft-linear-chunk", "20"]),
}


@pytest.fixture(scope="module", params=TAGS)
def script(request, tmp_path_factory) -> Path:
    """pretrain_gpt.py of one release."""
    return checkout(CLONE, request.param, tmp_path_factory.getbasetemp() / "releases")


@pytest.fixture(scope="module")
def start(script, tmp_path_factory) -> tuple[list[str], list[dict[str, str]]]:
    """Flags that load the common checkpoint, and what five steps from it print on one process."""
    folder = script.parent / "checkpoint"
    if not folder.exists():
        run(script, ["--train-iters", "1", "--lr", "1e-9", "--save", str(folder), "--save-interval", "1"])
    flags = ["--load", str(folder), "--finetune", "--train-iters", "5", *EAFT]
    return flags, reported(run(script, flags))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_losses_at_every_layout(script, start, layout):
    """From one checkpoint: the first step's eaft loss to 1e-5 of one process's, the fifth's to 1e-3."""
    flags, expected = start
    sizes, extra = LAYOUTS[layout]
    actual = reported(run(script, [*flags, *extra], **sizes))
    assert len(actual) == len(expected) == 5
    for step, tolerance in ((0, 1e-5), (4, 1e-3)):
        for name in ("eaft loss", "lm loss", "eaft weight", "eaft entropy"):
            assert float(actual[step][name]) == pytest.approx(float(expected[step][name]), rel=tolerance), (step, name)


def test_sft_is_megatrons_own(script):
    """--loss-type sft prints what the script prints without us, to the last digit."""
    flags = ["--train-iters", "3"]
    expected = reported(run(script, flags, hooked=False))
    actual = reported(run(script, [*flags, "--loss-type", "sft"]))
    assert len(expected) == 3 and "lm loss" in expected[0] and "eaft loss" not in actual[0]
    assert actual == expected


def test_the_heads_of_multi_token_prediction_keep_their_loss(script):
    """The first step's loss of the extra head is Megatron's own, with our loss on the main head or without."""
    flags = ["--train-iters", "1", "--mtp-num-layers", "1"]
    plain, eaft = (reported(run(script, [*flags, *extra]))[0] for extra in ([], EAFT))
    assert eaft["mtp_1 loss"] == plain["mtp_1 loss"]
    assert float(eaft["eaft loss"]) < float(eaft["lm loss"]) < float(plain["lm loss"])  # padded columns count there


@pytest.mark.parametrize(
    "extra", [["--mtp-num-layers", "1"], ["--use-mup", "--mup-output-mult", "0.5"]], ids=["mtp", "mup"]
)
def test_linear_chunks_beside(script, extra):
    """Extra heads and scaled logits: what is printed with whole logits, to rounding."""
    if (
        "--use-mup" in extra
        and "use_mup" not in (script.parent / "megatron/core/transformer/transformer_config.py").read_text()
    ):
        pytest.skip("this release has no MuP")
    flags = ["--train-iters", "2", *EAFT, *extra]
    whole, linear = (reported(run(script, [*flags, *more])) for more in ([], ["--eaft-linear-chunk", "20"]))
    names = [name for name in whole[0] if name.endswith("loss") or name == "grad norm"]
    assert len(whole) == len(linear) == 2 and len(names) >= 3
    for step in range(2):
        for name in names:
            assert float(linear[step][name]) == pytest.approx(float(whole[step][name]), rel=1e-4), (step, name)


def test_killed_and_resumed(script, tmp_path):
    """Save every two steps, kill -9 in the fifth, resume: the uninterrupted run's lines, to the last digit."""
    flags = ["--train-iters", "8", *EAFT]
    expected = reported(run(script, [*flags, "--save", str(tmp_path / "whole"), "--save-interval", "2"]))
    resumable = [*flags, "--save", str(tmp_path / "cut"), "--load", str(tmp_path / "cut"), "--save-interval", "2"]
    argv = command(script, resumable)
    with subprocess.Popen(
        argv, env=environment(script), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
    ) as process:
        for line in process.stdout:
            if "iteration        5/" in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        else:
            pytest.fail("the run ended before it could be killed")
    time.sleep(1)
    assert (tmp_path / "cut" / "latest_checkpointed_iteration.txt").read_text() == "4"
    first, second, *rest = reported(run(script, resumable))
    assert [first, *rest] == [expected[4], *expected[6:]]
    # A process's second line averages two iterations: Megatron prints the first one without starting its sums anew.
    assert second["grad norm"] == expected[5]["grad norm"]
    # The same command without its loss flags would go on with another loss, and is refused.
    forgetful = [flag for flag in resumable if flag not in EAFT]
    done = subprocess.run(
        command(script, forgetful), env=environment(script), capture_output=True, text=True, timeout=400
    )
    assert done.returncode != 0 and "the checkpoint was trained with --loss-type eaft, this run has sft" in done.stderr
