"""The gauntlet as a test. EAFT_GAUNTLET=report writes the table, EAFT_GAUNTLET=assert also asks for what it must be.

Templates come from PyPI, or from the folder that EAFT_GAUNTLET_FOLDER names.
"""

import os
from pathlib import Path

import pytest

from tests.data.gauntlet import report, sources
from tests.data.gauntlet.adapter import encode
from tests.data.gauntlet.goldens import GOLDENS
from tests.data.gauntlet.rows import ROWS
from tests.data.gauntlet.tokenizers import build, token_bytes

MODE = os.environ.get("EAFT_GAUNTLET")


@pytest.fixture(scope="session")
def folder() -> Path:
    target = sources.folder()
    try:
        sources.fetch(target)
    except RuntimeError as error:
        pytest.skip(f"no templates: {error}; {sources.FOLDER_VARIABLE} may name a folder that has them")
    return target


def trained_text(tokenizer, row: dict) -> list[str]:
    """The runs of trained tokens of a row's samples, as text; why there are none, if it is refused."""
    outcome = encode(tokenizer, row)
    runs = [outcome.refusal or outcome.crash] if not outcome.samples else []
    for ids, mask in outcome.samples:
        before = False
        for piece, flag in zip(token_bytes(tokenizer, ids), mask, strict=True):
            if flag:
                runs = [*runs, piece] if not before else [*runs[:-1], runs[-1] + piece]
            before = flag
    return [run.decode() if isinstance(run, bytes) else run for run in runs]


@pytest.mark.slow
@pytest.mark.skipif(MODE != "assert", reason="EAFT_GAUNTLET=assert runs it")
@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in GOLDENS.items() for row in rows])
def test_goldens(folder, name, row):
    """The trained text of the main families, written out by hand."""
    tokenizer = build(folder, sources.load(folder)[name])
    assert trained_text(tokenizer, ROWS[row]) == GOLDENS[name][row]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(MODE not in ("report", "assert"), reason="EAFT_GAUNTLET=report or =assert runs it")
def test_real_templates(folder, tmp_path):
    """No wrong mask, no text lost in silence, and at most a fifth of the pairs refused without a way out."""
    verdicts = report.run(folder)
    path = Path(os.environ.get("EAFT_GAUNTLET_TABLE", tmp_path / "gauntlet.md"))
    path.write_text(report.markdown(verdicts), encoding="utf-8")
    actual = report.totals(verdicts)
    print(path, dict(actual))
    assert sum(actual.values()) > 100 * 20
    if MODE == "assert":
        assert actual["wrong"] == 0
        assert actual["lost"] == 0
        assert actual["refused"] <= 0.2 * sum(actual.values())
