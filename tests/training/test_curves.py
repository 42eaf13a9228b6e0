"""The same loss curve at every parallel layout, and that of a Hugging Face model under the reference loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from eaft_megatron.data import collate, micro_batch_indices
from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.testing import run_distributed
from tests.training.tiny_run import arguments, metrics, samples, train_in_process
from tests.worlds import once

LAYOUTS = {  # name: (tensor, pipeline, data, more flags)
    "tp1 pp1": (1, 1, 1, ()),
    "tp2 pp1": (2, 1, 1, ()),
    "tp1 pp2": (1, 2, 1, ()),
    "tp2 pp2": (2, 2, 1, ()),
    "dp2": (1, 1, 2, ()),
    "dp2 distributed optimizer, micro-batch 2": (1, 1, 2, ("--use-distributed-optimizer", "--micro-batch-size", "2")),
    "pp2 interleaved": (1, 2, 1, ("--num-virtual-stages-per-pipeline-rank", "2")),
}


def _curve(folder, layout: str, loss_type: str) -> list[dict]:
    tensor, pipeline, data, extra = LAYOUTS[layout]
    run = f"{layout} {loss_type}".replace(" ", "-")
    flags = ("--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline))
    argv = arguments(folder, run, *flags, "--loss-type", loss_type, *extra)
    run_distributed(train_in_process, tensor * pipeline * data, argv, timeout=240)
    return metrics(folder, run)


@pytest.fixture(scope="module")
def curve() -> Callable:
    """What `_curve` returns, computed once for each argument."""
    return once(_curve)


def _hugging_face_curve(folder, loss_type: str) -> list[dict[str, float]]:
    """Five steps of transformers' own model with AdamW, in float32, on the same batches in the same order."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    data = samples(folder / "model", folder / "train.jsonl", 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    curve = []
    for step in range(5):
        (indices,) = micro_batch_indices(len(data), 1234, 8 * step, 8, 8, 0, 1)
        batch = collate([data[index] for index in indices])
        target = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        logits = model(batch["tokens"]).logits
        alpha = 1.0 if loss_type == "eaft" else 0.0
        loss, ce, entropy, weight = reference_eaft_loss(logits, target, alpha=alpha)
        tokens = batch["loss_mask"].sum()
        optimizer.zero_grad()
        (loss.sum() / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sums = {"lm loss": ce, "eaft loss": loss, "eaft weight": weight, "eaft entropy": entropy}
        row = {name: float(value.detach().sum() / tokens) for name, value in sums.items()}
        curve.append(row | {"grad norm": float(norm), "tokens": float(tokens)})
    return curve


@pytest.fixture(scope="module")
def hugging_face_curve() -> Callable:
    """What `_hugging_face_curve` returns, computed once for each argument."""
    return once(_hugging_face_curve)


CURVES = [  # the layouts of plain SFT are megatron-core's own business: two of them are enough
    # The four-process run and the distributed optimizer's are in every test run, and hold what these two hold.
    *(pytest.param(layout, "eaft", marks=pytest.mark.slow) for layout in ("tp2 pp1", "dp2")),
    *((layout, "eaft") for layout in LAYOUTS if layout not in ("tp2 pp1", "dp2")),
    ("tp1 pp1", "sft"),
    pytest.param("tp2 pp2", "sft", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout, loss_type", CURVES)
def test_curve_equals_hugging_face(hugging_face_curve, curve, folder, layout, loss_type):
    """Five optimizer steps: losses, weight, entropy and gradient norm to 1e-5 relative, with unequal loss masks."""
    expected, actual = hugging_face_curve(folder, loss_type), curve(folder, layout, loss_type)
    assert len(actual) == len(expected) == 5
    for step, (row, truth) in enumerate(zip(actual, expected, strict=True)):
        for name, value in truth.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-9), f"step {step}: {name}"


def test_the_curves_can_tell_the_losses_apart(hugging_face_curve, folder):
    """EAFT and SFT start from one cross entropy and part ways at once, or the comparison above proves nothing."""
    eaft, sft = hugging_face_curve(folder, "eaft"), hugging_face_curve(folder, "sft")
    assert eaft[0]["lm loss"] == sft[0]["lm loss"]
    assert abs(eaft[1]["lm loss"] - sft[1]["lm loss"]) > 1e-4
