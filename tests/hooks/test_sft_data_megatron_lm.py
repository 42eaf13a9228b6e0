"""--sft-data in Megatron-LM's untouched pretrain_gpt.py. Needs a clone of Megatron-LM (MEGATRON_LM_PATH)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets")

from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData, write_column
from tests.hooks.megatron_script import CLONE, TAGS, checkout, command, environment, needs_clone, reported, run
from tests.training.tiny_run import write_inputs

pytestmark = [pytest.mark.slow, *needs_clone]
VOCAB = 259
ROWS = 24
LAYOUTS = {"tp2": dict(tp=2, processes=2), "tp2 pp2": dict(tp=2, pp=2, processes=4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data packed into 256 positions, with a column of made-up scores, and a set to evaluate on."""
    folder = tmp_path_factory.mktemp("sft-data")
    write_inputs(folder)
    for name in ("train", "held_out"):
        prepare([str(folder / f"{name}.jsonl")], str(folder / "model"), folder / name, PrepareOptions(256))
    data = PreparedData(folder / "train")
    generator = np.random.default_rng(1)
    write_column(data, "ref_logprob", (-generator.exponential(size=n) for n in data.lengths), {})
    return folder


@pytest.fixture(scope="module", params=TAGS)
def start(request, folder, tmp_path_factory) -> tuple[Path, list[str]]:
    """The script of one release, and flags of two steps from a common checkpoint, each over every sample."""
    script = checkout(CLONE, request.param, tmp_path_factory.getbasetemp() / "releases")
    flags = ["--seq-length", "256", "--max-position-embeddings", "256", "--vocab-size", str(VOCAB - 1)]
    flags += ["--train-iters", "2", "--true-vocab-size", str(VOCAB), "--sft-data", str(folder / "train")]
    flags += ["--lr", "1e-3", "--loss-type", "eaft"]
    checkpoint = folder / f"checkpoint-{request.param}"
    if not checkpoint.exists():
        save = ["--train-iters", "1", "--lr", "1e-9", "--save", str(checkpoint), "--save-interval", "1"]
        run(script, [*flags, *_packed(folder), *save])
    return script, [*flags, "--load", str(checkpoint), "--finetune"]


def _packed(folder: Path) -> list[str]:
    """A step takes every pack once."""
    packs = PreparedData(folder / "train").manifest["packing"]["packs"]
    return ["--global-batch-size", str(packs)]


def _assert_alike(actual: list[dict], expected: list[dict], rel: float = 1e-5) -> None:
    assert len(actual) == len(expected) == 2
    for row, other in zip(actual, expected, strict=True):
        for name in ("lm loss", "eaft loss", "eaft entropy"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=rel), name


def test_packed_as_one_row_a_sample(start, folder):
    """The masked pack, and the rows one by one: the same losses in both steps, the second after an update."""
    script, flags = start
    packed = reported(run(script, [*flags, *_packed(folder)]))
    rows = ["--sft-packing", "none", "--global-batch-size", str(ROWS)]
    _assert_alike(packed, reported(run(script, [*flags, *rows])))


@pytest.mark.parametrize("loss", [["eaft"], ["talr"], ["sft-kl"]], ids=lambda loss: loss[0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_reach_every_rank(start, folder, layout, loss):
    """Packed, with scores and sequences carried beside get_batch: the first step is that of one process."""
    script, flags = start
    given = [*flags, *_packed(folder), "--loss-type", *loss]
    expected = reported(run(script, given))
    actual = reported(run(script, given, **LAYOUTS[layout]))
    _assert_alike(actual[:1] * 2, expected[:1] * 2)


def test_sets_are_evaluated_by_name(start, folder):
    """Two sets, side by side, each under its name; the same set twice gives the same loss, packed or not."""
    script, flags = start
    sets = ["--sft-eval-data", f"target={folder / 'held_out'}", "--sft-eval-data", f"again={folder / 'held_out'}"]
    sets += ["--sft-eval-data", f"training={folder / 'train'}", "--eval-iters", "50", "--eval-interval", "2"]
    sets += ["--lr", "1e-9"]
    packed = _evaluated(run(script, [*flags, *_packed(folder), *sets]))
    rows = _evaluated(run(script, [*flags, "--sft-packing", "none", "--global-batch-size", "8", *sets]))
    assert set(packed) == {"target", "again", "training"}
    assert packed["target"] == packed["again"] != packed["training"]
    for name, value in packed.items():
        assert rows[name] == pytest.approx(value, rel=1e-5)


def _evaluated(output: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(r"validation loss at iteration 2 \((\w+)\) \| lm loss value: (\S+)", output)
    }


def test_a_resumed_run_goes_on_with_the_next_samples(start, folder, tmp_path):
    """Stopped after two of four steps and resumed: the third and fourth print the digits of a run that never stopped.

    A folder that was packed anew in between is refused.
    """
    script, flags = start
    flags = [*flags, "--global-batch-size", "2", "--train-iters", "4"]
    expected = reported(run(script, flags))
    save = ["--save", str(tmp_path), "--save-interval", "2"]
    run(script, [*flags, *save, "--exit-interval", "2"])
    again = [flag for flag in flags if flag != "--finetune"] + ["--load", str(tmp_path)]
    resumed = reported(run(script, again))
    # The first line of a process that Megatron prints after a start is right; the second averages two iterations.
    assert resumed[0]["eaft loss"] == expected[2]["eaft loss"]
    manifest = folder / "train" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"efficiency": 0.', '"efficiency": 0.0'))
    try:
        with pytest.raises(AssertionError, match="trained on other data than --sft-data"):
            run(script, again)
    finally:
        manifest.write_text(text)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--sft-packing", "thd"], "needs --sft|needs Megatron-LM|refuses"),
        (["--sft"], "--transformer-impl local refuses"),
        (["--dataloader-type", "cyclic"], "--sft-data shuffles itself"),
        (["--seq-length", "128"], "packed for 256"),
        (["--true-vocab-size", "200"], "token id"),
    ],
)
def test_what_cannot_be_is_refused_at_start(start, folder, extra, message):
    """Before a model is built, with the flag and a way out."""
    import subprocess

    script, flags = start
    done = subprocess.run(
        command(script, [*flags, *_packed(folder), *extra]),
        env=environment(script),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-2000:]
