"""eaft_megatron.train on prepared folders: packed as unpacked as JSONL; the methods that need scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("datasets")

from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData, write_column
from eaft_megatron.testing.distributed import run_distributed
from tests.training.tiny_run import arguments, metrics, train_in_process

ROWS = 24


@pytest.fixture(scope="module")
def prepared(folder):
    """train.jsonl packed into 256 positions, with a column of made-up scores."""
    output = folder / "prepared"
    prepare([str(folder / "train.jsonl")], str(folder / "model"), output, PrepareOptions(256))
    data = PreparedData(output)
    generator = np.random.default_rng(1)
    write_column(data, "ref_logprob", (-generator.exponential(size=n) for n in data.lengths), {})
    return output


LOSSES = {
    "eaft": ["eaft"],
    "talr": ["talr"],
    "flow": ["flow"],
    "sft-kl": ["sft-kl"],
    "asft": ["asft"],
    "psft": ["psft"],
    "stm": ["stm"],
    "iw-sft": ["iw-sft"],
    "deft": ["deft"],
    "percentile": ["eaft", "--eaft-gate", "threshold", "--eaft-percentile", "15"],
}


SCORED = ("sft-kl", "asft", "psft", "stm", "iw-sft")


def _flags(folder, name: str, prepared, packing: str, *extra: str) -> list[str]:
    """Two steps, each over every sample, so that their order does not matter."""
    packs = PreparedData(prepared).manifest["packing"]["packs"]
    flags = [flag for flag in arguments(folder, name) if flag not in ("--data", str(folder / "train.jsonl"))]
    flags += ["--seq-length", "256", "--train-iters", "2", "--sft-data", str(prepared), "--sft-packing", packing]
    size = str(packs if packing == "mask" else ROWS)
    # Where a loss takes statistics of a micro-batch, that is everything.
    whole = [] if not extra or extra[0] == "eaft" and len(extra) == 1 else ["--micro-batch-size", size]
    return [*flags, "--global-batch-size", size, *whole, *(["--loss-type", *extra] if extra else [])]


def _train_each(runs: list[list[str]]) -> None:
    for argv in runs:
        train_in_process(argv)


def _assert_alike(actual: list[dict], expected: list[dict]) -> None:
    for row, other in zip(actual, expected, strict=True):
        for name in ("lm loss", "eaft loss", "eaft weight", "eaft entropy", "tokens", "grad norm"):
            assert math.isclose(row[name], other[name], rel_tol=1e-5), name


@pytest.fixture(scope="module")
def runs(folder, prepared):
    """Every loss packed and unpacked, and EAFT on the JSONL, one after another in one process."""
    argvs = [
        _flags(folder, f"{packing}-{name}", prepared, packing, *loss)
        for name, loss in LOSSES.items()
        for packing in ("mask", "none")
    ]
    jsonl = ["--seq-length", "256", "--train-iters", "2", "--global-batch-size", str(ROWS)]
    run_distributed(_train_each, 1, [*argvs, arguments(folder, "jsonl", *jsonl)])
    return folder


@pytest.mark.parametrize("name", LOSSES)
def test_packing_changes_nothing(runs, name):
    """Loss, weight, gradient norm of both steps: packed as one row a sample, to 1e-5; the second follows an update.

    With scores and sequences that must have stayed with their tokens.
    """
    packed, expected = metrics(runs, f"mask-{name}"), metrics(runs, f"none-{name}")
    _assert_alike(packed, expected)
    assert not math.isclose(packed[0]["lm loss"], packed[0]["eaft loss"], rel_tol=1e-3)


@pytest.fixture(scope="module")
def scored(folder):
    """The same rows with the scores that `eaft-megatron score` gives them, by the model that is then trained."""
    from eaft_megatron.cli import main

    output = folder / "scored"
    prepare([str(folder / "train.jsonl")], str(folder / "model"), output, PrepareOptions(256))
    assert main(["score", str(folder / "model"), str(output), "--device", "cpu"]) == 0
    argvs = [_flags(folder, f"scored-{method}", output, "mask", method) for method in SCORED]
    run_distributed(_train_each, 1, argvs)
    return PreparedData(output)


@pytest.mark.parametrize("method", SCORED)
def test_scores_of_the_model_itself(folder, scored, method):
    """In the first step p is p_base: loss and weight are numpy's from the column; in the second it no longer is."""
    logp = np.concatenate([scored.column("ref_logprob", i)[1:][scored.tokens(i)[1][1:]] for i in range(ROWS)])
    logp = logp.astype(np.float64)
    weight = {"asft": np.exp(logp), "stm": (np.exp(-logp) <= 2.5).astype(float)}.get(method, np.ones_like(logp))
    first, second = metrics(folder, f"scored-{method}")
    expected = {"lm loss": -logp.mean(), "eaft loss": (weight * -logp).mean(), "eaft weight": weight.mean()}
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
    if method != "sft-kl":
        assert first["eaft zero weight"] == pytest.approx((weight == 0).mean())
        assert (second["eaft weight"] == first["eaft weight"]) == (method == "stm"), "its mask is fixed by the base"
    assert second["eaft loss"] != pytest.approx(first["eaft loss"], rel=1e-4) or method == "stm"


def test_prepared_rows_are_those_of_the_jsonl(runs):
    """The file read directly gives the same two steps."""
    _assert_alike(metrics(runs, "jsonl"), metrics(runs, "none-eaft"))


@pytest.mark.slow
def test_packed_over_ranks(runs, prepared):
    """TP 2 x PP 2 as one process."""
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    flags = [*_flags(runs, "tp2pp2", prepared, "mask", "eaft"), *layout]
    run_distributed(train_in_process, 4, flags)
    _assert_alike(metrics(runs, "tp2pp2"), metrics(runs, "none-eaft"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "x.jsonl"], "either --data FILE.jsonl or --sft-data"),
        (["--sft-packing", "thd"], "--sft-packing thd is for Megatron-LM"),
        (["--transformer-impl", "transformer_engine"], "would look across the rows of a pack"),
        (["--seq-length", "128"], "packed for 256"),
        (["--sft-eval-data", "held"], "--sft-eval-data takes NAME=DIR"),
        (["--sft-eval-data", "held=/nowhere"], "--sft-eval-data: no such folder: /nowhere"),
    ],
)
def test_wrong_flags_are_named(folder, prepared, capsys, flags, message):
    """Exit code 1 before any process group."""
    from eaft_megatron.train import main

    given = [flag for flag in arguments(folder, "wrong") if flag not in ("--data", str(folder / "train.jsonl"))]
    assert main([*given, "--seq-length", "256", "--sft-data", str(prepared), *flags]) == 1
    assert message in capsys.readouterr().err


def test_scores_that_are_missing_are_named(folder, capsys, tmp_path):
    """sft-kl on JSONL, and on a folder that was never scored."""
    from eaft_megatron.train import main

    assert main(arguments(folder, "wrong", "--loss-type", "sft-kl")) == 1
    assert "`eaft-megatron score` it" in capsys.readouterr().err
    prepare([str(folder / "train.jsonl")], str(folder / "model"), tmp_path / "new", PrepareOptions(256))
    given = [flag for flag in arguments(folder, "wrong") if flag not in ("--data", str(folder / "train.jsonl"))]
    assert main([*given, "--seq-length", "256", "--sft-data", str(tmp_path / "new"), "--loss-type", "sft-kl"]) == 1
    assert "no column 'ref_logprob'" in capsys.readouterr().err
