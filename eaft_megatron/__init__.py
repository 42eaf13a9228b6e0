"""Entropy-adaptive fine-tuning (EAFT) for Megatron-style training. Importing this needs torch alone."""

from eaft_megatron._version import __version__
from eaft_megatron.loss.base_model_gates import ASFTGate, IWSFTGate, PSFTGate, STMGate
from eaft_megatron.loss.gate import Gate, GateContext, GateOutput
from eaft_megatron.loss.gates import (
    ConflictMaskGate,
    DFTGate,
    EAFTGate,
    FLOWGate,
    SFTGate,
    SFTKLGate,
    SigmoidGate,
    TALRGate,
    ThresholdGate,
    flow_sample_weights,
)
from eaft_megatron.loss.linear import vocab_parallel_linear_eaft_loss, vocab_parallel_linear_token_loss
from eaft_megatron.loss.probability_gates import DEFTGate, PowerGate, ProFitGate, TrSFTGate
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.vocab_parallel import (
    vocab_parallel_eaft_loss,
    vocab_parallel_token_loss,
    vocab_parallel_topk_entropy,
)

__all__ = [
    "ASFTGate",
    "ConflictMaskGate",
    "DEFTGate",
    "DFTGate",
    "EAFTGate",
    "FLOWGate",
    "Gate",
    "GateContext",
    "GateOutput",
    "IWSFTGate",
    "PSFTGate",
    "PowerGate",
    "ProFitGate",
    "SFTGate",
    "SFTKLGate",
    "STMGate",
    "SigmoidGate",
    "TALRGate",
    "ThresholdGate",
    "TokenStats",
    "TrSFTGate",
    "__version__",
    "flow_sample_weights",
    "vocab_parallel_eaft_loss",
    "vocab_parallel_linear_eaft_loss",
    "vocab_parallel_linear_token_loss",
    "vocab_parallel_token_loss",
    "vocab_parallel_topk_entropy",
]
