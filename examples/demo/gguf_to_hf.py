"""A GGUF file of a Llama-architecture model into a Hugging Face folder, dequantised.

    python examples/demo/gguf_to_hf.py FILE OUTPUT_DIR [--dtype bfloat16] [--tokenizer-dir DIR]

Needs the `gguf` package, and `tokenizers` for the tokenizer. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from eaft_megatron.files import new_folder
from eaft_megatron.models.config_fields import heads_and_groups, is_tied, model_sizes
from eaft_megatron.models.hf_writer import SafetensorsWriter, carry_files, check_output, finish_shards, write_config
from eaft_megatron.models.llama import LLAMA

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def gguf_to_hf(
    gguf_file: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_dir: str | Path | None = None,
) -> None:
    """Write config.json, safetensors in dtype and the tokenizer of a GGUF file to output_dir.

    Any quantisation the `gguf` package dequantises is read (Q4_1, Q8_0, K-quants, F16, ...). The tokenizer, with its
    chat template, is built from the file's metadata, or copied from tokenizer_dir.

    Raises:
        ValueError: not a readable GGUF file, not a plain Llama (experts, rotary scaling, biases, ...; the message
            names the field or tensor), a tokenizer we cannot rebuild, or an output_dir that is not empty.
    """
    output = Path(output_dir).absolute()
    check_output(output, dtype)
    reader = _open(Path(gguf_file))
    metadata = _Metadata(reader)
    names = {tensor.name: _hf_name(tensor.name) for tensor in reader.tensors}
    config = hf_config_of(metadata, tied="output.weight" not in names)
    LLAMA.check(config)
    sizes = model_sizes(config, padded_vocab=config["vocab_size"])
    expected = LLAMA.hf_shapes(is_tied(config), config["num_hidden_layers"], sizes)
    if missing := expected.keys() - set(names.values()):
        raise ValueError(f"{gguf_file} lacks the tensor behind {min(missing)}")
    with new_folder(output) as folder:
        if tokenizer_dir is None:
            from gguf_tokenizer import write_tokenizer

            write_tokenizer(metadata, folder)
        else:
            carry_files(Path(tokenizer_dir), folder)
        writer = SafetensorsWriter(folder, dtype=dtype)
        for tensor in reader.tensors:
            writer.add(names[tensor.name], _dequantise(tensor, config))
        writer.flush()
        finish_shards(folder, expected)
        write_config(folder, {**config, "torch_dtype": str(dtype).removeprefix("torch.")})


class _Metadata:
    """The key/value part of a GGUF file."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"the GGUF file has no {key}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that stands for it: 1e-05 rather than 9.999999747378752e-06."""
        import numpy as np

        return float(str(np.float32(self.need(key) if default is None else self.get(key, default))))


def hf_config_of(metadata: _Metadata, tied: bool) -> dict:
    """config.json as transformers' LlamaConfig reads it. ValueError, naming the field, for what is not plain Llama."""
    architecture = metadata.need("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture is {architecture!r}: only llama is supported")
    if metadata.get("llama.expert_count", 0):
        raise ValueError("llama.expert_count: mixtures of experts are not supported")
    if metadata.get("split.count", 1) > 1:
        raise ValueError("split.count: join the parts first (llama-gguf-split --merge)")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"llama.rope.scaling.type is {scaling!r}: not supported")
    heads, hidden = metadata.need("llama.attention.head_count"), metadata.need("llama.embedding_length")
    groups = metadata.get("llama.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise ValueError("llama.attention.head_count differs from layer to layer: not supported")
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"llama.rope.dimension_count is not the width of a head ({head_dim}): not supported")
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    ids = {f"{word}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for word, key in _SPECIAL.items()}
    return {
        "architectures": [LLAMA.name],
        "model_type": "llama",
        "vocab_size": metadata.get("llama.vocab_size", len(tokens)),
        "hidden_size": hidden,
        "intermediate_size": metadata.need("llama.feed_forward_length"),
        "num_hidden_layers": metadata.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.need("llama.context_length"),
        "rms_norm_eps": metadata.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.decimal("llama.rope.freq_base", 10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **{name: value for name, value in ids.items() if value is not None},
    }


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    import gguf

    try:
        return gguf.GGUFReader(str(path))
    except Exception as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error}") from error


def _hf_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor; ValueError for one that a plain Llama does not have."""
    if name in _NAMES:
        return _NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if prefix != "blk" or rest not in _LAYER_NAMES:
        raise ValueError(f"tensor {name} has no place in a plain Llama model")
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"


def _dequantise(tensor: Any, config: dict) -> torch.Tensor:
    """[rows, columns] in float32."""
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"tensor {tensor.name}: {tensor.tensor_type.name} cannot be dequantised: {error}") from error
    heads, groups, head_dim = heads_and_groups(config)
    if tensor.name.endswith("attn_q.weight"):
        values = _undo_rope_permutation(values, heads, head_dim)
    elif tensor.name.endswith("attn_k.weight"):
        values = _undo_rope_permutation(values, groups, head_dim)
    return torch.from_numpy(values.astype("float32", copy=True))


def _undo_rope_permutation(weight: Any, heads: int, head_dim: int) -> Any:
    """llama.cpp rotates neighbouring rows (2j, 2j + 1) of a head, transformers rows (j, j + head_dim / 2): its
    converter permutes the rows of q and k accordingly, and this puts them back."""
    pairs = weight.reshape(heads, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gguf_to_hf.py", description=gguf_to_hf.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", help="a .gguf file")
    parser.add_argument("output_dir", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokenizer-dir", help="copy the tokenizer from this folder instead of building it")
    args = parser.parse_args(argv)
    try:
        gguf_to_hf(args.file, args.output_dir, dtype=getattr(torch, args.dtype), tokenizer_dir=args.tokenizer_dir)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
