"""`eaft-megatron inspect`: the sample's text with the trained tokens marked, and the histograms."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("datasets")

from eaft_megatron.cli import main
from tests.data.conftest import build_tokenizer
from tests.data.conversations import chats, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve conversations, packed."""
    folder = tmp_path_factory.mktemp("inspect")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    given = ["--input", write(folder / "a.jsonl", chats(12)), "--tokenizer", str(folder / "tokenizer")]
    assert main(["prepare", *given, "--seq-length", "512", "--num-workers", "1", "--output", str(folder / "out")]) == 0
    return folder / "out"


def test_a_row_shows_what_is_trained(folder, capsys):
    """Everything the template wrote, the answers with their end of turn marked, nothing else."""
    assert main(["inspect", str(folder), "--row", "1", "--color", "never"]) == 0
    header, *text = capsys.readouterr().out.splitlines()
    assert re.match(r"--- row 1, .*a\.jsonl:2: \d+ tokens, \d+ trained on", header)
    expected = (
        "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n1 + 0?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1, 1, 1, <|im_end|>⟧\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n⟦2, 2, 2, <|im_end|>⟧\n"
    )
    assert "\n".join(text) == expected
    assert main(["inspect", str(folder), "--row", "1", "--color", "always"]) == 0
    assert "\x1b[1;32m1, 1, 1, <|im_end|>\x1b[0m" in capsys.readouterr().out


def test_the_summary_counts_every_row_and_pack(folder, capsys, tmp_path):
    """The bars of each histogram add up to the rows, or to the packs; the picture is a PNG."""
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "h.png")]) == 0
    output = capsys.readouterr().out
    sums = []
    for block in output.split("\n\n")[1:]:
        sums.append(sum(int(match) for match in re.findall(r" - +\d+[% ] +(\d+)", block)))
    packs = int(re.search(r"(\d+) rows", output).group(1)), sums[2]
    assert sums[:2] == [12, 12] and sums[2] == sums[3] and packs[0] == 12
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_a_sample_that_is_not_there(folder, capsys):
    """The range is named."""
    assert main(["inspect", str(folder), "--sample", "99"]) == 1
    assert "--sample 99" in capsys.readouterr().err
