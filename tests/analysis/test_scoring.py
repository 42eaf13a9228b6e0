"""`eaft-megatron score`: the numbers, what is kept of a killed run, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eaft_megatron.analysis import scoring
from eaft_megatron.analysis.batching import batches, windows
from eaft_megatron.analysis.model_record import model_record
from eaft_megatron.analysis.token_scores import full_entropy
from eaft_megatron.cli import main
from eaft_megatron.data.prepared import PreparedData
from eaft_megatron.testing.distributed import run_distributed
from tests.analysis.columns import truth
from tests.analysis.conftest import make_model

ALL = (
    "ref_logprob",
    "topk_entropy",
    "entropy",
    "topk_entropy_5",
    "topk_entropy_10",
    "topk_entropy_50",
    "sum_p_squared",
)


def values(folder, name: str) -> np.ndarray:
    data = PreparedData(folder)
    return np.concatenate([data.column(name, row) for row in range(len(data))])


def test_columns_are_transformers_own_numbers(model, folder, capsys):
    """Every column of every row, however it was batched; 0 at each row's first token; nothing temporary is left."""
    from transformers import AutoModelForCausalLM

    assert main(["score", str(model), str(folder), "--fidelity", "--sum-p-squared", "--batch-tokens", "300"]) == 0
    data, reference = PreparedData(folder), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert sorted(data.columns()) == sorted(ALL)
    for row in range(len(data)):
        for name, expected in truth(reference, data.tokens(row)[0]).items():
            actual = data.column(name, row)
            assert actual[0] == 0 and len(actual) == data.lengths[row]
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6, err_msg=f"{name}, row {row}")
    records = data.columns()
    assert [records[name].get("topk") for name in ALL] == [None, 20, None, 5, 10, 50, None]
    assert {key: records["entropy"]["model"][key] for key in records["entropy"]["model"]} == model_record(model)
    assert sorted(path.name for path in (folder / "columns").iterdir()) == sorted(ALL)


def test_a_repeated_run_does_nothing(model, folder, monkeypatch, capsys):
    """No model is loaded and no file changes; a further column is added without touching the others."""
    main(["score", str(model), str(folder)])
    assert sorted(PreparedData(folder).columns()) == ["ref_logprob", "topk_entropy"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("eaft_megatron.analysis.hf_backend.HFBackend", None)
        assert main(["score", str(model), str(folder)]) == 0
    assert "there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert main(["score", str(model), str(folder), "--full-entropy"]) == 0
    assert sorted(PreparedData(folder).columns()) == ["entropy", "ref_logprob", "topk_entropy"]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_another_model_is_refused(model, folder, tmp_path, capsys):
    """Other weights under the same config, another K, another precision; --overwrite replaces every score."""
    main(["score", str(model), str(folder), "--full-entropy"])
    other = make_model(tmp_path / "other", "untied")
    changed = shutil.copytree(model, tmp_path / "changed")
    change_one_tensor(changed)
    first = values(folder, "ref_logprob")
    for arguments in (
        [str(other)],
        [str(changed)],
        [str(model), "--topk", "5"],
        [str(model), "--dtype", "bfloat16"],
    ):
        assert main(["score", arguments[0], str(folder), *arguments[1:]]) == 1
        assert "--overwrite" in capsys.readouterr().err
    np.testing.assert_array_equal(values(folder, "ref_logprob"), first)
    assert main(["score", str(other), str(folder), "--overwrite"]) == 0
    records = PreparedData(folder).columns()
    assert sorted(records) == ["ref_logprob", "topk_entropy"], "the other model's entropy is gone too"
    assert records["ref_logprob"]["model"]["name"] == str(other)
    assert not np.allclose(values(folder, "ref_logprob"), first)


def change_one_tensor(folder) -> None:
    """Multiply one small tensor of one file by 1.01: size and config stay."""
    from safetensors.torch import load_file, save_file

    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})


KILLED = """
import contextlib, os, sys
from eaft_megatron.analysis import scoring
from eaft_megatron.cli import main
replacing, count = scoring.replacing, 0
@contextlib.contextmanager
def killed(path, durable):
    global count
    with replacing(path, durable=durable) as partial:
        yield partial
    count += path.suffix == ".npy"
    if count == 2:
        os.kill(os.getpid(), 9)
scoring.replacing = killed
scoring.windows = lambda lengths: [(i, min(i + 5, len(lengths))) for i in range(0, len(lengths), 5)]
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(model, folder, prepared, tmp_path, monkeypatch, capsys):
    """SIGKILL after two windows: no column; the next run scores the other rows alone, to the same bytes."""
    main(["score", str(model), str(shutil.copytree(prepared, tmp_path / "whole"))])
    arguments = ["score", str(model), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], env=env, capture_output=True).returncode == -9
    assert PreparedData(folder).columns() == {}
    (folder / "columns" / ".scoring" / ".rows-0000000010-0000000015.npy.new").write_bytes(b"half a file")
    seen = []
    make = scoring.make_batch
    monkeypatch.setattr(scoring, "make_batch", lambda data, rows: seen.extend(rows) or make(data, rows))
    monkeypatch.setattr(
        scoring, "windows", lambda lengths: [(i, min(i + 5, len(lengths))) for i in range(0, len(lengths), 5)]
    )
    assert main(arguments) == 0
    assert "14 of 24 rows are left" in capsys.readouterr().out
    assert sorted(seen) == list(range(10, 24))
    for name in ("ref_logprob", "topk_entropy"):
        np.testing.assert_allclose(values(folder, name), values(tmp_path / "whole", name), rtol=2e-6, atol=1e-6)
    assert not (folder / "columns" / ".scoring").exists()


def test_what_another_model_began_is_dropped(model, folder, capsys):
    """Finished windows count for the model that made them and for nothing else."""
    scratch = folder / "columns" / ".scoring"
    scratch.mkdir(parents=True)
    foreign = {"model": {"config_sha256": "x", "weights_fingerprint": "y"}, "dtype": "float32", "columns": {}}
    foreign |= {"window_tokens": scoring.WINDOW_TOKENS, "rows": 24}
    (scratch / "request.json").write_text(json.dumps(foreign))
    np.save(scratch / "rows-0000000000-0000000024.npy", np.zeros((2, 5)))
    assert main(["score", str(model), str(folder)]) == 0
    assert "dropped" in capsys.readouterr().out
    assert values(folder, "ref_logprob").min() < -1


def test_refusals(model, folder, tmp_path, make_damaged, capsys):
    """Each message names what to do."""
    strange = shutil.copytree(model, tmp_path / "strange")
    text = (strange / "tokenizer.json").read_text()
    (strange / "tokenizer.json").write_text(text.replace('"<|im_start|>"', '"<|begin|>"'))
    for arguments, message in (
        ([str(strange)], "another tokenizer"),
        ([str(tmp_path)], "--tokenizer"),
        ([str(model), "--topk", "1"], "--topk"),
        ([str(model), "--batch-tokens", "0"], "--batch-tokens"),
        ([str(model), "--tensor-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        ([str(model), "--backend", "hf", "--tensor-model-parallel-size", "2"], "--backend hf"),
        ([str(make_damaged(model))], "not a finite number"),
    ):
        assert main(["score", arguments[0], str(folder), *arguments[1:]]) == 1
        assert message in capsys.readouterr().err
    assert PreparedData(folder).columns() == {}


@pytest.fixture
def make_damaged(tmp_path):
    """A copy of a model whose first tensor holds a NaN."""

    def make(model):
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(model, tmp_path / "damaged")
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for tensor in tensors.values():
                tensor.flatten()[0] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return make


def test_windows_and_batches():
    """Windows cover the rows in order; batches hold each row of two tokens or more once, within the budget."""
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    lengths[7] = 500
    found = windows(lengths, 300)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == 200
    assert all(lengths[begin:end].sum() <= 300 or end == begin + 1 for begin, end in found)
    assert all(lengths[begin : end + 1].sum() > 300 for begin, end in found[:-1])
    parts = batches(lengths, 3, 120, 128)
    assert sorted(row for part in parts for row in part) == [row for row in range(3, 120) if lengths[row] > 1]
    for part in parts:
        assert len(part) * (max(lengths[part]) - 1) <= 128 or len(part) == 1
    assert windows(np.array([], dtype=np.int64)) == []


def megatron_answers(model, layouts, folders) -> bool:
    """One rank of four: score the same folder in several layouts."""
    from eaft_megatron.analysis.megatron_backend import MegatronBackend, MegatronTeam
    from eaft_megatron.training.setup import distributed

    options = scoring.ScoreOptions(fidelity=True, batch_tokens=300, sum_p_squared=True)
    scoring.windows = lambda lengths: [(i, min(i + 5, len(lengths))) for i in range(0, len(lengths), 5)]
    record = {"model": model_record(model), "dtype": "float32", "backend": "megatron"}
    for (tp, pp), folder in zip(layouts, folders, strict=True):
        args = SimpleNamespace(
            device="cpu",
            distributed_timeout_minutes=5,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_virtual_stages_per_pipeline_rank=None,
            seed=1,
        )
        with distributed(args) as device:
            team = MegatronTeam()
            load = lambda device=device: MegatronBackend(model, torch.float32, device)  # noqa: E731
            scoring.score(PreparedData(folder), record, options, load, team=team)
            assert scoring.score(PreparedData(folder), record, options, None, team=team) == []
            other = {**record, "dtype": "bfloat16"}
            with pytest.raises(ValueError, match="--overwrite"):  # on every rank
                scoring.score(PreparedData(folder), other, options, None, team=team)
    return True


@pytest.mark.slow
def test_megatron_core_gives_the_same(model, prepared, folder, tmp_path):
    """TP 2 x PP 2, TP 2 with two data-parallel ranks, PP 4: transformers' numbers to 1e-5."""
    pytest.importorskip("megatron.core")
    main(["score", str(model), str(folder), "--fidelity", "--sum-p-squared"])
    layouts = [(2, 2), (2, 1), (1, 4)]
    folders = [shutil.copytree(prepared, tmp_path / f"tp{tp}pp{pp}") for tp, pp in layouts]
    assert run_distributed(megatron_answers, 4, model, layouts, folders, timeout=400) == [True] * 4
    for other in folders:
        for name in ALL:
            actual, expected = values(other, name), values(folder, name)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=f"{other.name} {name}")


def test_full_entropy_with_infinities_and_certainty():
    """-inf columns, padding columns and an all but certain token, against float64."""
    logits = torch.randn(4, 7, 300, generator=torch.Generator().manual_seed(1)) * 4
    logits[0, :, 10:] = -torch.inf
    logits[1, :, 5] = 60.0
    logp = logits[..., :290].double().log_softmax(-1)
    expected = -(logp.exp() * logp).nan_to_num(0).sum(-1)
    torch.testing.assert_close(full_entropy(logits, vocab_size=290).double(), expected, rtol=1e-5, atol=1e-6)
