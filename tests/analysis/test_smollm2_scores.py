"""SmolLM2-135M-Instruct's own numbers on more than 5,000 real tokens: Python's documentation, which Python ships.

Give the model by the environment variable EAFT_SMOLLM2_GGUF, as for tests/models/test_smollm2.py.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from eaft_megatron.cli import main
from eaft_megatron.data.prepared import PreparedData
from tests.analysis.columns import truth
from tests.data.conversations import write

GGUF = os.environ.get("EAFT_SMOLLM2_GGUF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF, reason="EAFT_SMOLLM2_GGUF does not name a SmolLM2-135M-Instruct GGUF file"),
]


def test_scores_and_landscape_of_a_real_model(tmp_path):
    """Scores of a row are transformers' own; top-K entropy nears the full one as K grows; conflicts are rare.

    No near-1 threshold: on this small model the correlation at K = 20 is what it is.
    """
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM

    pytest.importorskip("gguf")
    from tests.examples.gguf_reader import gguf_to_hf

    model, folder = tmp_path / "model", tmp_path / "data"
    gguf_to_hf(GGUF, model)
    names = sorted(name for name in topics if len(topics[name]) > 2000)[::2]
    source = write(tmp_path / "topics.jsonl", [{"text": topics[name][:2000]} for name in names[:14]])
    arguments = ["--input", source, "--tokenizer", str(model), "--output", str(folder), "--seq-length", "1024"]
    assert main(["prepare", *arguments, "--num-workers", "1"]) == 0
    assert main(["score", str(model), str(folder), "--fidelity", "--sum-p-squared", "--batch-tokens", "1024"]) == 0
    assert main(["landscape", str(folder), "--output", str(tmp_path / "out")]) == 0

    data = PreparedData(folder)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, expected in truth(reference, data.tokens(3)[0]).items():
        np.testing.assert_allclose(data.column(name, 3), expected, rtol=1e-4, atol=1e-4, err_msg=name)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    print(json.dumps({key: summary[key] for key in ("tokens", "thresholds", "quadrants", "fidelity")}, indent=1))
    assert summary["tokens"] >= 5000
    for kind in ("pearson", "spearman"):
        correlations = [summary["fidelity"][k][kind] for k in ("5", "10", "20", "50")]
        assert correlations == sorted(correlations) and correlations[0] > 0.5 and correlations[-1] < 1
    # Were entropy and probability independent, both would be low for 15% of 15% of the tokens.
    assert summary["quadrants"]["conflict"]["share"] < 0.15**2
