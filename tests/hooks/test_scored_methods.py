"""`eaft-megatron score`, then `eaft_megatron.run` with each method that reads its column: Megatron's own training loop
on the model that scored, converted from the same Hugging Face folder.

In the first step p is p_base, so that loss and weight are numpy's from the column.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.hooks.megatron_jobs import Jobs

pytest.importorskip("datasets")
if not (importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.training")):
    pytest.skip("this megatron-core has no megatron.training (make test-megatron-training)", allow_module_level=True)

from eaft_megatron.cli import main
from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.models.hf_config import read_hf_config
from eaft_megatron.models.pretrain_flags import pretrain_flags
from tests.training.tiny_run import write_inputs


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[PreparedData, list[str]]:
    """(scored rows, flags that train on all of them in each of two steps)."""
    folder = tmp_path_factory.mktemp("scored")
    write_inputs(folder)
    model, rows, checkpoint = (str(folder / name) for name in ("model", "rows", "megatron"))
    prepare([str(folder / "train.jsonl")], model, Path(rows), PrepareOptions(256))
    assert main(["score", model, rows, "--device", "cpu"]) == 0
    assert main(["convert", "to-megatron", model, checkpoint]) == 0
    data = PreparedData(rows)
    config = read_hf_config(model)
    flags = [*pretrain_flags(config, transformer_impl="local"), "--seq-length", "256", "--sft-data", rows]
    flags += ["--true-vocab-size", str(config["vocab_size"]), "--load", checkpoint, "--finetune", "--train-iters", "2"]
    flags += ["--no-load-optim", "--no-load-rng", "--dist-ckpt-strictness", "log_all"]
    return data, [*flags, "--global-batch-size", str(data.manifest["packing"]["packs"])]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.mark.parametrize("method", ["sft-kl", "asft", "psft", "stm", "iw-sft", "flow"])
def test_scores_of_the_model_itself(scored, jobs, method):
    """A weight of 1 where the model is compared with itself, p for ASFT, STM's mask, FLOW's weight of each row."""
    data, flags = scored
    rows = [data.column("ref_logprob", i)[1:][data.tokens(i)[1][1:]].astype(np.float64) for i in range(len(data))]
    logp, means = np.concatenate(rows), np.array([-row.mean() for row in rows])
    weights = {
        "asft": np.exp(logp),
        "stm": (np.exp(-logp) <= 2.5).astype(float),
        "flow": np.exp(-means / np.median(means)).repeat([len(row) for row in rows]),
    }
    weight = weights.get(method, np.ones_like(logp))
    first, second = jobs.run("pretrain_wheel.py", [*flags, "--loss-type", method]).steps
    expected = {"lm loss": -logp.mean(), "eaft loss": (weight * -logp).mean(), "eaft weight": weight.mean()}
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert second["lm loss"] < first["lm loss"]
    if method not in ("sft-kl", "flow"):
        assert first["eaft zero weight"] == pytest.approx((weight == 0).mean(), abs=1e-6)
