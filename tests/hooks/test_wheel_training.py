"""The training loop that megatron-core's wheel carries from 0.19.2 on, under ``eaft_megatron.run --device cpu``.

`make test-megatron-training` runs this on Python 3.12; where the wheel has no megatron.training it is skipped. Its
losses at every layout: `test_production_layouts.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.hooks.megatron_script import reported, run

SCRIPT = Path(__file__).with_name("pretrain_wheel.py")


def _wheel_has_training() -> bool:
    return bool(importlib.util.find_spec("megatron")) and bool(importlib.util.find_spec("megatron.training"))


pytestmark = pytest.mark.skipif(
    not _wheel_has_training(), reason="this megatron-core has no megatron.training (make test-megatron-training)"
)


def test_sft_is_megatrons_own():
    """--loss-type sft prints what the script prints without us, to the last digit."""
    flags = ["--train-iters", "2"]
    expected = reported(run(SCRIPT, flags, hooked=False))
    actual = reported(run(SCRIPT, [*flags, "--loss-type", "sft"]))
    assert len(expected) == 2 and actual == expected and "eaft loss" not in actual[0]
