"""The forgetting experiment: its falsified answers, its evaluation, its table, and the whole of it at toy length."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "forgetting"
METHODS = ("sft", "eaft", "dft", "talr", "flow", "sft-kl")


def _script(name: str) -> ModuleType:
    """By path, under a name of its own; the folders it looks into leave sys.path again."""
    spec = importlib.util.spec_from_file_location(f"forgetting_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


tasks, outcome = _script("tasks"), _script("outcome")


def _solutions(count: int) -> list[dict]:
    messages = [
        [
            {"role": "user", "content": f"{n} and 10?"},
            {"role": "assistant", "content": f"{n} + 10 = {n + 10}\n#### {n + 10}"},
        ]
        for n in range(count)
    ]
    return [{"id": f"gsm8k-{n}", "messages": turns} for n, turns in enumerate(messages)]


def _calls(count: int) -> list[dict]:
    rows = []
    for n in range(count):
        arguments = {"city": f"city {n}", "days": n, "at": [0.5, {"name": f"n{n}"}], "warm": n % 2 == 0}
        answer = json.dumps({"name": "weather", "arguments": arguments})
        rows.append({"id": f"bfcl-{n}", "messages": [{"role": "assistant", "content": answer}]})
    return rows


def _shape(value):
    """Kinds and names, no values."""
    if isinstance(value, dict):
        return {name: _shape(item) for name, item in value.items()}
    return [_shape(item) for item in value] if isinstance(value, list) else type(value)


def test_half_of_the_answers_are_falsified_and_nothing_else():
    for task, rows in (("gsm8k", _solutions(400)), ("bfcl", _calls(400))):
        before = json.dumps(rows)
        falsified = tasks.falsified(task, rows)
        assert json.dumps(rows) == before and tasks.falsified(task, rows) == falsified
        assert 150 < sum(row["falsified"] for row in falsified) < 250
        for row, other in zip(rows, falsified, strict=True):
            assert row["id"] == other["id"] and row["messages"][:-1] == other["messages"][:-1]
            same = row["messages"][-1] == other["messages"][-1]
            assert same != other["falsified"]


def test_every_digit_of_a_falsified_solution_is_another():
    for row, other in zip(_solutions(200), tasks.falsified("gsm8k", _solutions(200)), strict=True):
        text, falsified = row["messages"][-1]["content"], other["messages"][-1]["content"]
        assert re.sub(r"\d", "0", text) == re.sub(r"\d", "0", falsified)
        if other["falsified"]:
            digits = [pair for pair in zip(text, falsified, strict=True) if pair[0].isdigit()]
            assert digits and all(a != b for a, b in digits)
            assert not re.search(r"(?<!\d)0\d", falsified), "a number begins with 0"


def test_every_value_of_a_falsified_call_is_another_of_its_kind():
    rows = _calls(200)
    known = {text for row in rows for text in tasks._strings(tasks._arguments(row))}
    for row, other in zip(rows, tasks.falsified("bfcl", rows), strict=True):
        if not other["falsified"]:
            continue
        old, new = (json.loads(item["messages"][-1]["content"]) for item in (row, other))
        assert old["name"] == new["name"] and _shape(old) == _shape(new)
        old, new = old["arguments"], new["arguments"]
        assert all(old[name] != new[name] for name in old) and old["at"][0] != new["at"][0]
        assert {new["city"], new["at"][1]["name"]} <= known


def _results(changes: dict[str, tuple[float, ...]]) -> dict:
    def numbers(loss):
        return {"loss": loss, "accuracy": 0.5, "exact": 0.25}

    runs = [dict(task="bfcl", data=None, method="base", seed=None, target=numbers(2.0), general=numbers(3.0))]
    for method, rises in changes.items():
        for seed, rise in enumerate(rises, 1):
            runs.append(
                dict(
                    task="bfcl",
                    data="clean",
                    method=method,
                    seed=seed,
                    mean_weight=1.0,
                    target=numbers(1.0),
                    general=numbers(3.0 + rise),
                )
            )
    conflicts = {"bfcl_clean": dict(loss=1.0, conflict_share=0.01, conflict_loss_share=0.02)}
    return {"runs": runs, "seeds": [1, 2, 3], "conflicts": conflicts}


def test_table_has_means_spreads_and_paired_differences():
    text = outcome.table(_results({"sft": (0.1, 0.2, 0.3), "eaft": (0.0, 0.2, 0.1)}))
    (line,) = [line for line in text.splitlines() if line.startswith("| eaft")]
    # General: 0, 0.2, 0.1; against sft, seed by seed: -0.1, 0, -0.2.
    assert "+0.1000 ± 0.1000 | -0.1000 ± 0.1000" in line and "-1.000 ± 0.000" in line
    with pytest.raises(ValueError, match="bfcl, clean, eaft: the seeds are not"):
        outcome.table(_results({"sft": (0.1, 0.2, 0.3), "eaft": (0.0, 0.2)}))


def test_one_seed_has_no_spread():
    results = _results({"sft": (0.1,)})
    results["seeds"] = [1]
    assert "±" not in outcome.table(results)


def test_front_is_what_nothing_beats():
    points = {"much": (3.0, 2.0), "beaten": (1.0, 1.5), "some": (2.0, 1.0), "none": (0.0, 0.0), "twin": (2.0, 1.0)}
    assert outcome.front(points) == ["none", "some", "twin", "much"]


def _own_metrics(model: Path, rows: list[dict]) -> dict[str, float]:
    """Mean cross entropy, accuracy and exact answers: rendered, tokenized and averaged here, one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    total, tokens, right, exact = 0.0, 0, 0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n")  # behind <|im_end|>
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            out = network(input_ids=ids, labels=labels)
        hits = out.logits[0, start - 1 : -1].argmax(-1) == ids[0, start:]
        total += float(out.loss) * len(hits)
        tokens, right, exact = tokens + len(hits), right + int(hits.sum()), exact + bool(hits.all())
    return {"loss": total / tokens, "accuracy": right / tokens, "exact": exact / len(rows)}


@pytest.mark.slow
def test_the_experiment_at_toy_length(tmp_path):
    """Every method and two seeds on a tiny random model: the pipeline, not what comes out of it."""
    pytest.importorskip("megatron.core")
    pytest.importorskip("matplotlib")
    from tests.training.tiny_run import write_inputs

    write_inputs(tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    solutions = _solutions(60)
    general = [{"id": f"text {n}", "text": f"Text number {n} goes on and on."} for n in range(5)]
    tasks.write_tasks(output, {"gsm8k": (solutions[:40], solutions[40:])}, general, {})
    command = [sys.executable, str(FOLDER / "experiment.py"), "--output", str(output), "--device", "cpu"]
    command += ["--model", str(tmp_path / "model"), "--tasks", "gsm8k", "--seeds", "1", "2", "--jobs", "2"]
    command += ["--data", "conflict", "--train-iters", "2", "--seq-length", "128", "--dtype", "float32"]

    def run(*extra: str) -> dict:
        done = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert (output / "table.md").read_text() in done.stdout
        return json.loads((output / "results.json").read_text())

    results = run()
    runs = {(row["method"], row["seed"]): row for row in results["runs"]}
    assert runs.keys() == {("base", None), *((method, seed) for method in METHODS for seed in (1, 2))}
    base = runs["base", None]
    for name, value in _own_metrics(tmp_path / "model", solutions[40:]).items():
        assert base["target"][name] == pytest.approx(value, rel=1e-5), name
    assert base["target"]["rows"] == 20 and base["general"]["rows"] == 5
    for key, row in runs.items():
        if key != ("base", None):
            assert row["target"]["loss"] != base["target"]["loss"] and row["train_tokens"] > 0
    # Equal seeds, equal samples: before the first update every method sees the same batch.
    assert len({row["train_tokens"] for (_, seed), row in runs.items() if seed == 1}) == 1
    assert 0 < runs["eaft", 1]["mean_weight"] < runs["sft", 1]["mean_weight"] == 1
    assert all(f"| {method} |" in (output / "table.md").read_text() for method in METHODS)
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")
    # Not finished, other settings: done again. Finished: left alone.
    kept, redone = (output / "runs" / f"gsm8k-conflict-{name}" / "result.json" for name in ("eaft-1", "eaft-2"))
    before = kept.stat().st_mtime_ns
    redone.unlink()
    again = run()
    assert kept.stat().st_mtime_ns == before and redone.exists()
    for row, other in zip(results["runs"], again["runs"], strict=True):
        assert (row["target"], row["general"]) == (other["target"], other["general"])
    other = run("--lr", "1e-3", "--methods", "eaft", "--seeds", "1")
    assert kept.stat().st_mtime_ns > before and other["runs"][1]["target"] != runs["eaft", 1]["target"]
    failed = subprocess.run([*command, "--seq-length", "127"], capture_output=True, text=True, timeout=500)
    assert failed.returncode == 1 and "needs another --output" in failed.stderr
