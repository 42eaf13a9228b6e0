"""Entropy-adaptive fine-tuning (EAFT) for Megatron-style training. Importing this needs torch alone."""

from eaft_megatron._version import __version__
from eaft_megatron.loss.gates import (
    ConflictMaskGate,
    DFTGate,
    EAFTGate,
    FLOWGate,
    Gate,
    GateContext,
    GateOutput,
    SFTGate,
    SFTKLGate,
    SigmoidGate,
    TALRGate,
    ThresholdGate,
    flow_sample_weights,
)
from eaft_megatron.loss.linear import vocab_parallel_linear_eaft_loss, vocab_parallel_linear_token_loss
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.vocab_parallel import (
    vocab_parallel_eaft_loss,
    vocab_parallel_token_loss,
    vocab_parallel_topk_entropy,
)

__all__ = [
    "ConflictMaskGate",
    "DFTGate",
    "EAFTGate",
    "FLOWGate",
    "Gate",
    "GateContext",
    "GateOutput",
    "SFTGate",
    "SFTKLGate",
    "SigmoidGate",
    "TALRGate",
    "ThresholdGate",
    "TokenStats",
    "__version__",
    "flow_sample_weights",
    "vocab_parallel_eaft_loss",
    "vocab_parallel_linear_eaft_loss",
    "vocab_parallel_linear_token_loss",
    "vocab_parallel_token_loss",
    "vocab_parallel_topk_entropy",
]
