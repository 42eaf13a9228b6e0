"""HybridModel, Megatron-LM's successor of GPTModel: what it lacks or passes over in silence, looked for at start."""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from eaft_megatron import megatron_map

_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")  # from 0.18 on, before
_IGNORED = {  # Megatron's argument -> what the rotary embedding would have to be given
    "rotary_interleaved": "rotary_interleaved",
    "use_rope_scaling": "rope_scaling",
}


def is_hybrid(args: argparse.Namespace) -> bool:
    """Whether the flags describe a stack by its pattern, as pretrain_hybrid.py and pretrain_mamba.py take it."""
    return any(getattr(args, name, None) for name in _PATTERNS)


def check_hybrid(args: argparse.Namespace) -> None:
    """``ValueError`` for a HybridModel that cannot be built, or whose rotary embedding would not be what was asked for.

    Up to 0.19 (and on Megatron-LM's main branch of November 2026) it builds its rotary embedding without
    --rotary-interleaved and --use-rope-scaling: the model then trains with other positions than it was pretrained
    with, and nothing fails. Where a release passes them on, or the spec is one of ours that mends it, nothing is said.
    """
    if not is_hybrid(args):
        return
    spec = getattr(args, "spec", None)
    if megatron_map.comes_with_megatron(spec) and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "--hybrid-layer-pattern: Megatron's hybrid layers exist for Transformer Engine alone, which is not "
            "installed here: install it (pip install 'transformer-engine[pytorch]'), or on a machine without a GPU "
            "give `python -m eaft_megatron.run --device cpu --transformer-engine standin`"
        )
    if getattr(args, "position_embedding_type", None) != "rope":
        return
    passed_on = megatron_map.hybrid_rotary_source()
    for name, parameter in _IGNORED.items():
        if getattr(args, name, False) and parameter not in passed_on and not _mends(spec, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag}: HybridModel of this Megatron builds its rotary embedding without it, so that the positions "
                "would silently be wrong: train this model with pretrain_gpt.py"
            )


def _mends(spec: list[str] | None, name: str) -> bool:
    """Whether the module of the stack's spec says in ``MENDS`` that it makes up for the missing option."""
    if not spec:
        return False
    try:
        return name in getattr(importlib.import_module(spec[0]), "MENDS", ())
    except ImportError:
        return False  # Megatron will say so
