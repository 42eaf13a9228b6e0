"""`eaft-megatron prepare`: what is written, what is counted, what is refused, and what an interruption leaves."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("datasets")

from eaft_megatron.cli import main
from eaft_megatron.data import encoding
from eaft_megatron.data.chat import encode_row
from eaft_megatron.data.encoding import _in_order
from eaft_megatron.data.prepare import prepare, repack
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData, evaluation_folders, training_folder
from tests.data.conftest import build_tokenizer
from tests.data.conversations import chats, write


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    """The tiny ChatML tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_rows_are_those_of_the_tokenizer(tmp_path, tokenizer_dir, tokenizer):
    """Each row holds the ids and the mask that encode_row gives, in the order of the file, and where it stood."""
    rows = chats(20)
    prepare([write(tmp_path / "a.jsonl", rows)], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    data = PreparedData(tmp_path / "out")
    assert len(data) == 20
    for index, row in enumerate(rows):
        [expected], actual = encode_row(tokenizer, row).samples, data[index]
        assert actual.input_ids.tolist() == expected.input_ids
        assert actual.labels_mask.tolist() == list(expected.labels_mask)
        assert (actual.sequence_id, actual.source) == (index, f"{tmp_path}/a.jsonl:{index + 1}")
        assert data.lengths[index] == len(expected.input_ids)
    assert data.max_token_id == max(max(data[index].input_ids) for index in range(20))


def test_datasets_opens_the_shards(tmp_path, tokenizer_dir):
    """`datasets.Dataset.from_file` reads what was written."""
    import datasets

    prepare([write(tmp_path / "a.jsonl", chats(5))], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    opened = datasets.Dataset.from_file(str(tmp_path / "out" / "rows" / "data-00000.arrow"))
    data = PreparedData(tmp_path / "out")
    assert [row["input_ids"] for row in opened] == [data[index].input_ids.tolist() for index in range(5)]


def test_the_number_of_workers_changes_nothing(tmp_path, tokenizer_dir):
    """Two processes write the same bytes as one, over more batches than are in flight at a time."""
    source = write(tmp_path / "a.jsonl", chats(1000))
    for workers in (1, 2):
        prepare([source], tokenizer_dir, tmp_path / f"out{workers}", PrepareOptions(512), num_workers=workers)
    one, two = tmp_path / "out1", tmp_path / "out2"
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_doing_it_again_does_nothing(tmp_path, tokenizer_dir):
    """The same command leaves every file untouched, also under another name of the same input and tokenizer."""
    source = write(tmp_path / "a.jsonl", chats(5))
    expected = prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    actual = prepare([f"{tmp_path}/./a.jsonl"], tokenizer_dir + "/", tmp_path / "out", PrepareOptions(512))
    assert actual == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_other_options_are_refused_and_overwritten_on_request(tmp_path, tokenizer_dir):
    """What differs is named; --overwrite replaces."""
    source = write(tmp_path / "a.jsonl", chats(5))
    prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    with pytest.raises(ValueError, match="seq_length 512, now 256.*--overwrite"):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(256))
    write(tmp_path / "a.jsonl", chats(6))
    with pytest.raises(ValueError, match="inputs"):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(256), overwrite=True)
    assert PreparedData(tmp_path / "out").manifest["rows"] == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not what this command would make"):
        prepare([source], tokenizer_dir, tmp_path / "mine", PrepareOptions(512))


def test_what_is_not_ours_is_never_removed(tmp_path, tokenizer_dir):
    """--overwrite spares a folder that also holds the input; a file and a folder in use are refused."""
    source = write(tmp_path / "chat.jsonl", chats(3))
    with pytest.raises(ValueError, match=r"also holds (chat\.jsonl|in-use.*), which is not ours"):
        prepare([source], tokenizer_dir, tmp_path, PrepareOptions(512), overwrite=True)
    with pytest.raises(ValueError, match="a file or a mount point"):
        prepare([source], tokenizer_dir, source, PrepareOptions(512), overwrite=True)
    with open(tmp_path / ".in-use.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `prepare` is writing"):
            prepare([source], tokenizer_dir, tmp_path / "in-use", PrepareOptions(512))
    assert len((tmp_path / "chat.jsonl").read_text().splitlines()) == 3


def test_a_link_is_followed(tmp_path, tokenizer_dir):
    """--output through a link to another disk fills what it points to, also the second time."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    source = write(tmp_path / "a.jsonl", chats(3))
    for overwrite in (False, True):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512), overwrite=overwrite)
    assert (tmp_path / "out").is_symlink() and len(PreparedData(tmp_path / "scratch")) == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "incomplete" in path.name]


def test_an_output_inside_its_input_is_not_read_again(tmp_path, tokenizer_dir):
    """--input D --output D/prepared does nothing the second time; a file named twice is refused."""
    source = write(tmp_path / "a.jsonl", chats(3))
    for _ in range(2):
        manifest = prepare([str(tmp_path)], tokenizer_dir, tmp_path / "prepared", PrepareOptions(512))["train"]
    assert manifest["counts"]["input_rows"] == 3
    with pytest.raises(ValueError, match="twice"):
        prepare([source, source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))


def test_a_killed_worker_ends_the_run(tmp_path, tokenizer_dir, monkeypatch):
    """For want of memory, say: an error, not a wait without end."""
    source = write(tmp_path / "a.jsonl", chats(2000))

    def killing(pool, batches, in_flight):
        for number, encoded in enumerate(_in_order(pool, batches, in_flight)):
            if number == 0:
                os.kill(next(iter(pool._processes)), signal.SIGKILL)
            yield encoded

    monkeypatch.setattr(encoding, "_in_order", killing)
    with pytest.raises(ValueError, match="a worker process was killed"):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512), num_workers=2)
    assert not list(tmp_path.glob("out*"))


def test_overlong_rows(tmp_path, tokenizer_dir):
    """Cut, dropped or refused; each is counted, and what is cut is counted in tokens."""
    long = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x" * 400}]}
    source = write(tmp_path / "a.jsonl", [*chats(3), long])
    cut = prepare([source], tokenizer_dir, tmp_path / "cut", PrepareOptions(256))["train"]
    assert (cut["rows"], cut["counts"]["truncated"], cut["longest_row"]) == (4, 1, 257)
    whole = prepare([source], tokenizer_dir, tmp_path / "whole", PrepareOptions(1024))["train"]
    assert whole["counts"]["tokens"] == cut["counts"]["tokens"] + cut["counts"]["tokens_cut_off"]
    dropped = prepare([source], tokenizer_dir, tmp_path / "dropped", PrepareOptions(256, overlong="drop"))["train"]
    assert (dropped["rows"], dropped["counts"]["dropped_overlong"]) == (3, 1)
    with pytest.raises(ValueError, match=r"a\.jsonl:4: \d+ tokens, and --seq-length 256"):
        prepare([source], tokenizer_dir, tmp_path / "refused", PrepareOptions(256, overlong="error"))
    assert not (tmp_path / "refused").exists()


def test_a_bad_row_stops_several_workers(tmp_path, tokenizer_dir):
    """The error of a worker process reaches the user as it is."""
    source = write(tmp_path / "a.jsonl", [*chats(2), '{"messages": ['])
    with pytest.raises(ValueError, match=r"a\.jsonl:3: broken JSON"):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512), num_workers=2)
    assert not list(tmp_path.glob("out*"))


def test_bad_rows_stop_or_are_counted(tmp_path, tokenizer_dir):
    """A broken line names file and line and leaves nothing behind; --on-error skip counts it and keeps the rest."""
    source = write(tmp_path / "a.jsonl", [*chats(2), '{"messages": [', {"answer": "42"}, *chats(1)])
    with pytest.raises(ValueError, match=r"a\.jsonl:3: broken JSON.*--on-error skip"):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    assert not list(tmp_path.glob("out*"))
    options = PrepareOptions(512, on_error="skip")
    manifest = prepare([source], tokenizer_dir, tmp_path / "out", options)["train"]
    assert (manifest["rows"], manifest["counts"]["input_rows"], manifest["counts"]["rows_with_errors"]) == (3, 5, 2)
    assert "a.jsonl:3" in manifest["errors"][0] and "a.jsonl:4" in manifest["errors"][1]
    assert [PreparedData(tmp_path / "out")[index].sequence_id for index in range(3)] == [0, 1, 4]


def test_nothing_to_train_on_is_refused(tmp_path, tokenizer_dir):
    """Answers beyond the sequence length: an error with the counts, and no folder."""
    row = {"messages": [{"role": "user", "content": "?" * 300}, {"role": "assistant", "content": "!"}]}
    with pytest.raises(ValueError, match="dropped_nothing_to_train_on 1"):
        prepare([write(tmp_path / "a.jsonl", [row])], tokenizer_dir, tmp_path / "out", PrepareOptions(64))
    assert not list(tmp_path.glob("out*"))


def test_parts_are_disjoint_and_whole(tmp_path, tokenizer_dir):
    """--valid-fraction and --test-fraction: every row in one part, about as many as asked for, found by their names."""
    source = write(tmp_path / "a.jsonl", chats(200))
    options = PrepareOptions(512, valid_fraction=0.2, test_fraction=0.1)
    manifests = prepare([source], tokenizer_dir, tmp_path / "out", options)
    assert training_folder(tmp_path / "out") == tmp_path / "out" / "train"
    assert list(evaluation_folders(tmp_path / "out")) == ["valid", "test"]
    ids = {
        name: {PreparedData(tmp_path / "out" / name)[i].sequence_id for i in range(m["rows"])}
        for name, m in manifests.items()
    }
    assert sorted(i for part in ids.values() for i in part) == list(range(200))
    assert 25 <= len(ids["valid"]) <= 55 and 10 <= len(ids["test"]) <= 32
    with pytest.raises(ValueError, match="name one of its parts"):
        PreparedData(tmp_path / "out")


def test_repacking_touches_nothing_but_the_packing(tmp_path, tokenizer_dir):
    """Rows keep their bytes; the manifest names the new packing; a length that is too short says what to do."""
    source = write(tmp_path / "a.jsonl", chats(30))
    prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    before = (tmp_path / "out" / "rows" / "data-00000.arrow").read_bytes()
    assert (
        main(["prepare", "--repack", str(tmp_path / "out"), "--seq-length", "1024", "--pad-to-multiple-of", "4"]) == 0
    )
    data = PreparedData(tmp_path / "out")
    assert (tmp_path / "out" / "rows" / "data-00000.arrow").read_bytes() == before
    assert data.manifest["packing"]["seq_length"] == 1024
    packed = sorted(row for pack in range(data.manifest["packing"]["packs"]) for row in data.pack(pack))
    assert packed == list(range(30))
    assert len(list((tmp_path / "out").glob("packing-*"))) == 1
    with pytest.raises(ValueError, match="packed anew since, for 1024"):
        prepare([source], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    with pytest.raises(ValueError, match="rows are longer than --seq-length 16"):
        repack(tmp_path / "out", 16)


def test_a_run_that_is_killed_leaves_nothing_that_looks_whole(tmp_path, tokenizer_dir):
    """SIGKILL while rows are written: no output folder; the same command then makes what an undisturbed one makes."""
    source = write(tmp_path / "a.jsonl", chats(3000))
    command = [sys.executable, "-m", "eaft_megatron.cli", "prepare", "--input", source, "--tokenizer", tokenizer_dir]
    command += ["--seq-length", "512", "--num-workers", "1", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    shard = tmp_path / "out.incomplete" / "rows" / "data-00000.arrow"
    while process.poll() is None and not (shard.exists() and shard.stat().st_size > 10_000):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        PreparedData(tmp_path / "out")
    options = PrepareOptions(512)
    prepare([source], tokenizer_dir, tmp_path / "out", options)
    prepare([source], tokenizer_dir, tmp_path / "undisturbed", options)
    name = "rows/data-00000.arrow"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not (tmp_path / "out.incomplete").exists()


def test_another_tokenizer_is_noticed(tmp_path, tokenizer_dir):
    """A tokenizer with one token more is refused; the same vocabulary with another chat template is not."""
    prepare([write(tmp_path / "a.jsonl", chats(3))], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    data = PreparedData(tmp_path / "out")
    data.check_tokenizer(build_tokenizer(template=None))
    other = build_tokenizer()
    other.add_tokens(["<think>"])
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        data.check_tokenizer(other)


def test_lost_files_are_noticed(tmp_path, tokenizer_dir):
    """A shard that is gone, a manifest of another format, a folder that is none."""
    prepare([write(tmp_path / "a.jsonl", chats(3))], tokenizer_dir, tmp_path / "out", PrepareOptions(512))
    manifest = tmp_path / "out" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match="format version 99"):
        PreparedData(tmp_path / "out")
    manifest.write_text(text.replace('"rows": 3,\n  "max', '"rows": 4,\n  "max'))
    with pytest.raises(ValueError, match="3 rows, but its manifest says 4"):
        PreparedData(tmp_path / "out")
    manifest.write_text(text[:100])
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        PreparedData(tmp_path / "out")
    manifest.write_text(text)
    (tmp_path / "out" / "rows" / "data-00000.arrow").unlink()
    with pytest.raises(ValueError, match="is missing"):
        PreparedData(tmp_path / "out")
    with pytest.raises(ValueError, match="not a prepared folder"):
        PreparedData(tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seq-length", "10", "--pad-to-multiple-of", "4"], "multiple of --pad-to-multiple-of 4"),
        (["--seq-length", "16", "--valid-fraction", "1"], "--valid-fraction 1.0"),
        (["--seq-length", "16", "--tokenizer", "/nowhere"], "--tokenizer /nowhere: cannot be loaded"),
        (["--seq-length", "16", "--input", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--seq-length", "16", "--repack", "/x"], "remove --input"),
    ],
)
def test_wrong_flags_are_named(tmp_path, tokenizer_dir, capsys, flags, message):
    """Exit code 1, one line, no folder."""
    given = ["--input", write(tmp_path / "a.jsonl", chats(1)), "--tokenizer", tokenizer_dir, "--num-workers", "1"]
    assert main(["prepare", *given, "--output", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
