"""Hugging Face models in megatron-core and back: configuration, model, weights. Importing this needs torch alone."""

from eaft_megatron.models.build import build_model, layer_spec
from eaft_megatron.models.hf_config import read_hf_config
from eaft_megatron.models.load import load_hf_weights
from eaft_megatron.models.megatron_config import padded_vocab_size, transformer_config
from eaft_megatron.models.save import save_hf_weights

__all__ = [
    "build_model",
    "layer_spec",
    "load_hf_weights",
    "padded_vocab_size",
    "read_hf_config",
    "save_hf_weights",
    "transformer_config",
]
