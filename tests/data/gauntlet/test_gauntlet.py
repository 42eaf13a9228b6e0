"""The gauntlet as a test. EAFT_GAUNTLET=report writes the table, EAFT_GAUNTLET=assert also asks for what it must be.

Templates come from PyPI, or from the folder that EAFT_GAUNTLET_FOLDER names.
"""

import os
from pathlib import Path

import pytest

from tests.data.gauntlet import report, sources

MODE = os.environ.get("EAFT_GAUNTLET")


@pytest.fixture(scope="session")
def folder() -> Path:
    target = sources.folder()
    try:
        sources.fetch(target)
    except RuntimeError as error:
        pytest.skip(f"no templates: {error}; {sources.FOLDER_VARIABLE} may name a folder that has them")
    return target


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
