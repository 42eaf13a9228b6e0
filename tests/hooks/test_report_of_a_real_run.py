"""`eaft-megatron report` on the events that megatron.training itself wrote; where the wheel has it (0.19.2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from eaft_megatron.hooks.metrics import METRICS
from tests.hooks.megatron_script import VOCAB, reported, run

SCRIPT = Path(__file__).with_name("pretrain_wheel.py")


@pytest.mark.skipif(
    not (importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.training")),
    reason="this megatron-core has no megatron.training (make test-megatron-training)",
)
def test_every_curve_is_what_was_printed_and_the_newest_checkpoints_are_kept(tmp_path, capsys):
    """Hundreds of flags stand among the events as texts; the curves have the numbers of Megatron's console."""
    from eaft_megatron.cli import main
    from eaft_megatron.launch.curves import read_run

    flags = ["--train-iters", "3", "--loss-type", "eaft", "--true-vocab-size", str(VOCAB)]
    flags += ["--log-throughput", "--log-timers-to-tensorboard", "--log-memory-to-tensorboard"]
    flags += ["--save", str(tmp_path / "checkpoints"), "--save-interval", "1", "--save-keep-last", "2"]
    printed = reported(run(SCRIPT, [*flags, "--tensorboard-dir", str(tmp_path / "tensorboard")]))
    read = read_run(tmp_path)
    assert set(METRICS) <= read.training.keys() and "validation" in read.validation
    for name in METRICS:
        for step in (1, 3):  # Megatron's second line after a start is the mean of two iterations
            assert read.training[name][step] == pytest.approx(float(printed[step - 1][name]), rel=1e-5), (name, step)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000002", "iter_0000003"]
    assert main(["report", str(tmp_path)]) == 0
    assert (
        "iteration 3, checkpoint of iteration 3" in capsys.readouterr().out
        and (tmp_path / "report.png").stat().st_size > 10_000
    )
