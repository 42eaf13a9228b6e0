"""The training loop that megatron-core's wheel carries from 0.19.2 on, under ``eaft_megatron.run --device cpu``.

`make test-megatron-training` runs this on Python 3.12; where the wheel has no megatron.training it is skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.hooks.megatron_script import VOCAB, reported, run

SCRIPT = Path(__file__).with_name("pretrain_wheel.py")
EAFT = ["--loss-type", "eaft", "--true-vocab-size", str(VOCAB)]


def _wheel_has_training() -> bool:
    return bool(importlib.util.find_spec("megatron")) and bool(importlib.util.find_spec("megatron.training"))


pytestmark = pytest.mark.skipif(
    not _wheel_has_training(), reason="this megatron-core has no megatron.training (make test-megatron-training)"
)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[list[str], list[dict[str, str]]]:
    """Flags that load a common checkpoint, and what three steps from it print on one process."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    run(SCRIPT, ["--train-iters", "1", "--lr", "1e-9", "--save", str(folder), "--save-interval", "1"], port=29770)
    flags = ["--load", str(folder), "--finetune", "--train-iters", "3", *EAFT]
    return flags, reported(run(SCRIPT, flags, port=29771))


@pytest.mark.parametrize("layout", [dict(tp=2, processes=2), dict(pp=2, processes=2), dict(processes=2)])
def test_the_same_losses_at_every_layout(start, layout):
    """The first step's numbers to 1e-5 of one process's, the third's to 1e-3."""
    flags, expected = start
    actual = reported(run(SCRIPT, flags, port=29772, **layout))
    assert len(actual) == len(expected) == 3
    for step, tolerance in ((0, 1e-5), (2, 1e-3)):
        for name in ("eaft loss", "lm loss", "eaft weight", "eaft entropy"):
            assert float(actual[step][name]) == pytest.approx(float(expected[step][name]), rel=tolerance), (step, name)


def test_sft_is_megatrons_own():
    """--loss-type sft prints what the script prints without us, to the last digit."""
    flags = ["--train-iters", "2"]
    expected = reported(run(SCRIPT, flags, port=29773, hooked=False))
    actual = reported(run(SCRIPT, [*flags, "--loss-type", "sft"], port=29774))
    assert len(expected) == 2 and actual == expected and "eaft loss" not in actual[0]
