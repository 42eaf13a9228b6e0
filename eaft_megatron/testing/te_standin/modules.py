"""Which modules and names ``transformer_engine`` has here, and the finder that answers imports with them.

megatron-core takes a missing submodule for "this version does not have that": ``pytorch.optimizers`` is left out so
that it uses torch's Adam, ``pytorch.graph``, ``cpu_offload`` and ``permutation`` because nothing here could do it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from eaft_megatron.testing.te_standin import unsupported
from eaft_megatron.testing.te_standin.attention import DotProductAttention
from eaft_megatron.testing.te_standin.base import Module
from eaft_megatron.testing.te_standin.linear import GroupedLinear, LayerNormLinear, Linear
from eaft_megatron.testing.te_standin.norms import LayerNorm, RMSNorm
from eaft_megatron.testing.te_standin.packing import thd_get_partitioned_indices
from eaft_megatron.testing.te_standin.rotary import apply_rotary_pos_emb, split_along_dim

VERSION = "2.9.0"
"""What it claims to be. Later versions make megatron-core ask for more (2.14: grouped weights, 2.19: GTP)."""

ROOTS = ("transformer_engine", "transformer_engine_torch")

_FP8 = {
    "FP8GlobalStateManager": unsupported.FP8State,
    "fp8_autocast": unsupported.fp8_autocast,
    "fp8_model_init": unsupported.fp8_autocast,
}
_ROUTER = ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss")

_CONTENTS: dict[str, dict[str, Any]] = {
    "transformer_engine_torch": {"thd_get_partitioned_indices": thd_get_partitioned_indices},
    "transformer_engine": {"__version__": VERSION},
    "transformer_engine.common": {},
    "transformer_engine.common.recipe": {
        "Format": unsupported.Format,
        "Recipe": unsupported.Recipe,
        "DelayedScaling": unsupported.DelayedScaling,
    },
    "transformer_engine.pytorch": {
        "Linear": Linear,
        "LayerNormLinear": LayerNormLinear,
        "GroupedLinear": GroupedLinear,
        "LayerNorm": LayerNorm,
        "RMSNorm": RMSNorm,
        "DotProductAttention": DotProductAttention,
        "fp8_autocast": unsupported.fp8_autocast,
        "fp8_model_init": unsupported.fp8_autocast,
    },
    "transformer_engine.pytorch.fp8": _FP8,
    "transformer_engine.pytorch.distributed": {
        "CudaRNGStatesTracker": unsupported.RNGStatesTracker,
        "activation_recompute_forward": unsupported.activation_recompute_forward,
        "is_fp8_activation_recompute_enabled": unsupported.FP8State.is_fp8_enabled,
        "checkpoint": unsupported.refusing("its own activation checkpointing"),
    },
    "transformer_engine.pytorch.ops": {"Sequential": unsupported.refusing("ops"), "FusibleOperation": object},
    "transformer_engine.pytorch.attention": {"_SplitAlongDim": split_along_dim},
    "transformer_engine.pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
    "transformer_engine.pytorch.module": {},
    "transformer_engine.pytorch.module.base": {
        "TransformerEngineBaseModule": Module,
        "get_dummy_wgrad": unsupported.refusing("weight gradients that a fused kernel accumulated"),
    },
    "transformer_engine.pytorch.tensor": {"QuantizedTensor": unsupported.QuantizedTensor},
    "transformer_engine.pytorch.router": {name: unsupported.refusing(f"router.{name}") for name in _ROUTER},
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of ``transformer_engine`` and what ``importlib.metadata`` says of it; nothing else."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        # A package without a path, so that a submodule that is not listed raises ModuleNotFoundError.
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname in _CONTENTS else None

    def exec_module(self, module: Any) -> None:
        vars(module).update(_CONTENTS[module.__name__])
        if module.__name__ == "transformer_engine":  # the real one imports its parts too
            for name in _CONTENTS:
                if name.startswith("transformer_engine."):
                    importlib.import_module(name)

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        wanted = getattr(context, "name", None)
        if wanted is None or wanted.lower().replace("_", "-") == "transformer-engine":
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """The package's metadata: a name and a version."""

    def read_text(self, filename: str) -> str | None:
        known = f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {VERSION}\n"
        return known if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"the Transformer Engine stand-in has no files ({path})")
