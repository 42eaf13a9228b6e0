"""A tiny random model with its tokenizer, and a prepared folder of conversations in that tokenizer's ids."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from tests.data.conftest import build_tokenizer
from tests.data.conversations import chats, write
from tests.models.tiny import save, tiny_llama

ROWS = 24


def make_model(folder: Path, variant: str = "tied") -> Path:
    """A tiny Llama in float32 whose vocabulary is a little larger than its tokenizer's."""
    tokenizer = build_tokenizer()
    model = tiny_llama(variant, vocab_size=len(tokenizer) + 3, max_position_embeddings=512)
    save(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, model) -> Path:
    """Unscored; never written to."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare([write(folder / "a.jsonl", chats(ROWS))], str(model), folder / "out", PrepareOptions(512))
    return folder / "out"


@pytest.fixture
def folder(tmp_path, prepared) -> Path:
    """A copy to score."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))
