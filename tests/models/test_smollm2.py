"""SmolLM2-135M-Instruct through GGUF -> Hugging Face -> megatron-core -> Hugging Face, against transformers.

Give the file by the environment variable EAFT_SMOLLM2_GGUF; nothing is downloaded.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from eaft_megatron.models import read_hf_config, save_hf_weights
from eaft_megatron.testing.distributed import run_distributed
from tests.models import ranks
from tests.models.tiny import next_token_loss

GGUF = os.environ.get("EAFT_SMOLLM2_GGUF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF, reason="EAFT_SMOLLM2_GGUF does not name a SmolLM2-135M-Instruct GGUF file"),
]

LAYOUTS = [(1, 1), (3, 1), (1, 2)]
LOGIT_TOLERANCE = 1e-3  # absolute; logits of size about 30 after thirty layers

# Abraham Lincoln at Gettysburg, 1863.
PARAGRAPH = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, \
testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great \
battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those who \
here gave their lives that that nation might live. It is altogether fitting and proper that we should do this."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("gguf")
    from tests.examples.gguf_reader import gguf_to_hf

    output = tmp_path_factory.mktemp("smollm2") / "hf"
    gguf_to_hf(GGUF, output)
    return output


def load(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ids(tokenizer) -> torch.Tensor:
    return tokenizer(PARAGRAPH, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def expected(folder, ids) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(ids).logits


def test_conversion_equals_transformers_gguf_reader(expected, ids):
    """Two readers of the same file."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    path = Path(GGUF)
    with torch.no_grad():
        theirs = load(path.parent, gguf_file=path.name)(ids).logits
    torch.testing.assert_close(expected, theirs, atol=1e-4, rtol=0)


def test_tokenizer_and_answer(folder, tokenizer):
    """The chat template, the special tokens, and a model that knows what it was trained on."""
    assert (tokenizer.eos_token, tokenizer.pad_token_id, len(tokenizer)) == ("<|im_end|>", 2, 49152)
    assert tokenizer.eos_token == tokenizer.pad_token
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    prompt = tokenizer(text, return_tensors="pt")
    answer = load(folder).generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def forward_and_export(folder: Path, tp: int, pp: int, ids: torch.Tensor, output: Path) -> torch.Tensor | None:
    """One rank: logits on the last stage's first tensor-parallel rank; exports the model."""
    hf_config = read_hf_config(folder)
    with ranks.layout(tp, pp), torch.no_grad():
        from megatron.core import parallel_state

        chunks = ranks.built(folder, tp, pp)
        logits = ranks.run(chunks, ids, hf_config["vocab_size"], pp, backward=False)
        save_hf_weights(chunks, folder, output)
        return logits if parallel_state.get_tensor_model_parallel_rank() == 0 else None


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_megatron_equals_transformers(folder, ids, expected, tmp_path, tp, pp):
    """Logits, perplexity on real text to four digits, and an export that transformers reads to the same logits."""
    output = tmp_path / "export"
    answers = run_distributed(forward_and_export, tp * pp, folder, tp, pp, ids, output, timeout=500)
    (logits,) = [answer for answer in answers if answer is not None]
    difference = (logits - expected).abs().max().item()
    perplexities = [math.exp(next_token_loss(values, ids)) for values in (logits, expected)]
    print(f"tp {tp} pp {pp}: max |difference| {difference:.2e}, perplexities {perplexities}")
    assert difference <= LOGIT_TOLERANCE
    assert f"{perplexities[0]:.4g}" == f"{perplexities[1]:.4g}"
    with torch.no_grad():
        assert torch.equal(load(output)(ids).logits, expected)
