"""Whole runs under torchrun, as a user starts them: killed and resumed, exported, and given bad input."""

from __future__ import annotations

import contextlib
import json
import shutil
import time

import psutil
import pytest
import torch

from eaft_megatron.data import micro_batch_indices
from tests.training.tiny_run import arguments, metrics, samples, torchrun

FINISH_S = 150


def _run(processes: int, argv: list[str]) -> tuple[int, str]:
    process = torchrun(processes, argv)
    try:
        output, _ = process.communicate(timeout=FINISH_S)
    except BaseException:
        process.kill()
        raise
    return process.returncode, output


def _losses(rows: list[dict]) -> list[tuple]:
    names = ("iteration", "lm loss", "eaft loss", "eaft weight", "eaft entropy", "grad norm", "learning rate")
    return [tuple(row[name] for name in names) for row in rows]


def _kill_everything(process) -> None:
    """SIGKILL to torchrun and to every worker: workers outlive a torchrun that is killed alone."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for worker in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(everyone, timeout=20)
    process.wait()


@pytest.mark.slow
def test_killed_in_mid_run_it_resumes_with_the_same_losses(folder):
    """TP 2: kill -9 of everything after the second checkpoint, resume: the very losses of the uninterrupted run."""
    layout = ("--tensor-model-parallel-size", "2", "--train-iters", "8", "--lr-decay-style", "cosine")
    code, output = _run(2, arguments(folder, "whole", *layout))
    assert code == 0, output
    checkpoints = folder / "killed" / "checkpoints"
    saving = ("--save", str(checkpoints), "--load", str(checkpoints), "--save-interval", "2")
    argv = arguments(folder, "killed", *layout, *saving)
    process = torchrun(2, argv)
    deadline = time.monotonic() + FINISH_S
    while not (checkpoints / "iter_0000004").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    _kill_everything(process)
    saved = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < 8, "the run was over before it could be killed"
    # What a kill in the middle of a save leaves: a folder the tracker does not name.
    shutil.copytree(checkpoints / f"iter_{saved:07d}", checkpoints / "iter_0000006.incomplete")
    code, output = _run(2, argv)
    assert code == 0, output
    assert f"resumed from iteration {saved}" in output
    assert _losses(metrics(folder, "killed")) == _losses(metrics(folder, "whole"))
    assert metrics(folder, "killed", evaluation=True)[-1] == metrics(folder, "whole", evaluation=True)[-1]
    assert not list(checkpoints.glob("*.incomplete"))


@pytest.mark.slow
def test_another_layout_resumes_and_exports(folder):
    """A checkpoint of TP 2 continues at PP 2, to 1e-5; the export gives transformers the trained model."""
    import transformers

    checkpoints, exported = folder / "resharded" / "checkpoints", folder / "resharded" / "hf"
    common = ("--train-iters", "4", "--save", str(checkpoints), "--load", str(checkpoints))
    code, output = _run(
        2, arguments(folder, "resharded", "--tensor-model-parallel-size", "2", *common, "--exit-interval", "2")
    )
    assert code == 0, output
    flags = ("--pipeline-model-parallel-size", "2", *common, "--export-hf", str(exported))
    code, output = _run(2, arguments(folder, "resharded", *flags))
    assert code == 0, output
    code, output = _run(1, arguments(folder, "straight", "--train-iters", "4"))
    assert code == 0, output
    for ours, truth in zip(metrics(folder, "resharded"), metrics(folder, "straight"), strict=True):
        assert ours["eaft loss"] == pytest.approx(truth["eaft loss"], rel=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    data = samples(exported, folder / "held_out.jsonl", 128)
    total = count = 0.0
    for sample in data:
        with torch.no_grad():
            logits = model(sample["tokens"][None]).logits[0]
        ce = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="none")
        total, count = total + float((ce * sample["loss_mask"]).sum()), count + float(sample["loss_mask"].sum())
    after = metrics(folder, "resharded", evaluation=True)[-1]
    assert after["tokens"] == count
    assert after["lm loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_the_distributed_optimizer_resumes(folder):
    """DP 2, sharded optimizer: stopped and resumed it has the losses of a whole run; other data are refused."""
    whole = arguments(folder, "dist-whole", "--use-distributed-optimizer", "--train-iters", "4")
    code, output = _run(2, whole)
    assert code == 0, output
    saves = folder / "dist" / "checkpoints"
    argv = arguments(folder, "dist", "--use-distributed-optimizer", "--train-iters", "4", "--save", str(saves))
    argv += ["--load", str(saves)]
    code, output = _run(2, [*argv, "--exit-interval", "2"])
    assert code == 0, output
    code, output = _run(2, argv)
    assert code == 0, output
    assert "resumed from iteration 2" in output
    assert _losses(metrics(folder, "dist")) == _losses(metrics(folder, "dist-whole"))
    code, output = _run(1, [*argv, "--data", str(folder / "held_out.jsonl")])
    assert code != 0
    assert "was made with --data-sha256" in output


@pytest.mark.slow
def test_a_nan_names_step_and_rank_and_ends_every_rank(folder):
    """One embedding is NaN: the run ends at the iteration whose batch has that token, and names the last stage."""
    import transformers

    broken = folder / "broken"
    shutil.copytree(folder / "model", broken)
    config = transformers.AutoConfig.from_pretrained(broken)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(broken)
    rows = (folder / "train.jsonl").read_text().splitlines()
    indices = [i for step in range(3) for i in micro_batch_indices(len(rows), 1234, 8 * step, 8, 8, 0, 1)[0]]
    marked = json.loads(rows[indices[10]])  # in the second iteration
    marked["messages"][1]["content"] += "#"
    rows[indices[10]] = json.dumps(marked)
    (folder / "marked.jsonl").write_text("\n".join(rows))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("#")] = float("nan")
    model.save_pretrained(broken)
    argv = arguments(folder, "nan", "--hf-model", str(broken), "--data", str(folder / "marked.jsonl"))
    code, output = _run(2, [*argv, "--pipeline-model-parallel-size", "2"])
    assert code != 0
    assert "iteration 2: the loss is not finite on rank(s) [1]" in output, output
    assert len(metrics(folder, "nan")) == 1


BAD_INPUT = {
    "missing data": (["--data", "nowhere.jsonl"], "--data: no such file: nowhere.jsonl"),
    "missing model": (["--hf-model", "nowhere"], "nowhere"),
    "heads": (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3: 4 attention heads"),
    "layers": (["--pipeline-model-parallel-size", "3"], "--pipeline-model-parallel-size 3: 4 layers"),
    "world size": (["--tensor-model-parallel-size", "2"], "do not divide by --tensor-model-parallel-size 2"),
    "batch": (["--global-batch-size", "5", "--micro-batch-size", "2"], "--global-batch-size 5 must be a multiple"),
    "alpha": (["--eaft-alpha", "-1"], "--eaft-alpha"),
    "topk": (["--eaft-topk", "1"], "--eaft-entropy-norm"),
    "evaluation set": (["--eval-data", "held_out.jsonl"], "--eval-data takes NAME=FILE"),
    "vocabulary": (["--true-vocab-size", "12"], "--true-vocab-size 12, but the model's config.json says 259"),
    "virtual stages": (["--num-virtual-stages-per-pipeline-rank", "2"], "--pipeline-model-parallel-size > 1"),
    "recompute": (["--recompute-num-layers", "1"], "need --recompute-granularity"),
    "unused flag": (["--talr-tau", "1"], "--talr-tau is for --loss-type talr, not eaft"),
    "side column": (["--loss-type", "flow"], "--loss-type flow needs scores"),
    "save": (["--save-interval", "2"], "--save-interval without --save"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_flags_are_named(folder, name, capsys, monkeypatch):
    """In one process: exit code 1, the flag in the message, no traceback, and before any process group exists."""
    from eaft_megatron.train import main

    extra, message = BAD_INPUT[name]
    monkeypatch.setenv("WORLD_SIZE", "3" if name in ("heads", "layers", "world size") else "1")
    monkeypatch.setenv("RANK", "0")
    assert main(arguments(folder, "bad", *extra)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not torch.distributed.is_initialized()


def test_a_broken_line_is_named_with_file_and_line(folder, capsys, monkeypatch):
    """JSONL that ends in the middle of a record."""
    from eaft_megatron.train import main

    monkeypatch.setenv("WORLD_SIZE", "1")
    path = folder / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut o')
    assert main(arguments(folder, "bad", "--data", str(path))) == 1
    assert f"{path}:2" in capsys.readouterr().err


def test_a_token_beyond_the_vocabulary_is_found_before_training(folder, capsys, monkeypatch, tmp_path):
    """A tokenizer that does not belong to the model."""
    from eaft_megatron.train import main

    monkeypatch.setenv("WORLD_SIZE", "1")
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert main(arguments(folder, "bad", "--hf-model", str(model))) == 1
    assert "ends at 99: tokenizer and model do not belong together" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_input_ends_every_rank_within_seconds(folder):
    """Under torchrun with two ranks: non-zero exit and no hang; what fails before start-up fails on both."""
    for extra in (["--data", "nowhere.jsonl"], ["--tensor-model-parallel-size", "2", "--eaft-alpha", "-1"]):
        began = time.monotonic()
        code, output = _run(2, arguments(folder, "bad", *extra))
        assert code != 0
        assert "[rank 0] ValueError" in output or "[rank 1] ValueError" in output
        assert time.monotonic() - began < 60
