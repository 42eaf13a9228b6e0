"""The gates that every implementation is tested with, and a batch for them."""

from __future__ import annotations

import dataclasses

import torch

from eaft_megatron.loss import base_model_gates, gates, probability_gates

VOCAB, TOKENS = 50, 48


GATES = {
    "sft": gates.SFTGate(),
    "eaft": gates.EAFTGate(),
    "eaft cubed, norm 3": gates.EAFTGate(alpha=3.0, entropy_norm=3.0),
    "sigmoid": gates.SigmoidGate(),
    "threshold": gates.ThresholdGate(threshold=0.5),
    "percentile": gates.ThresholdGate(percentile=15.0),
    "conflict mask": gates.ConflictMaskGate(percentile=40.0),
    "dft": gates.DFTGate(),
    "talr": gates.TALRGate(),
    "talr, tau 2": gates.TALRGate(tau=2.0, min_weight=0.1),
    "flow": gates.FLOWGate(),
    "sft-kl": gates.SFTKLGate(),
    "fixed conflict mask": gates.ConflictMaskGate(conflict_entropy=0.4, conflict_probability=0.3),
    "fixed conflict mask, norm 3": gates.ConflictMaskGate(3.0, None, 0.4, 0.3),
    "power 2": probability_gates.PowerGate(2.0),
    "power 0": probability_gates.PowerGate(0.0),
    "power -0.5": probability_gates.PowerGate(-0.5, max_weight=4.0),
    "profit": probability_gates.ProFitGate(),
    "trsft": probability_gates.TrSFTGate(),
    "deft": probability_gates.DEFTGate(),
    "asft": base_model_gates.ASFTGate(),
    "psft": base_model_gates.PSFTGate(),
    "stm": base_model_gates.STMGate(),
    "iw-sft": base_model_gates.IWSFTGate(),
    "iw-sft, temperature 2": base_model_gates.IWSFTGate(temperature=2.0),
    "iw-sft token": base_model_gates.IWSFTGate("token"),
}


@dataclasses.dataclass
class Batch:
    """Two data-parallel ranks' tokens: logits [2, T, V], the rest [2, T]; padded to 52 columns."""

    logits: torch.Tensor
    target: torch.Tensor
    sequence_ids: torch.Tensor
    side: dict[str, torch.Tensor]


def gate_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    scale = 6 * torch.rand(2, TOKENS, 1, generator=generator, dtype=torch.float64)
    logits = scale * torch.randn(2, TOKENS, 52, generator=generator, dtype=torch.float64)
    target = torch.randint(0, VOCAB, (2, TOKENS), generator=generator)
    target[torch.rand(2, TOKENS, generator=generator) < 0.3] = -100
    # Five sequences on rank 0, four on rank 1; sequence 7 has no valid token, sequence 3 lies on both ranks.
    ids = torch.tensor([[0] * 9 + [1] * 3 + [2] * 20 + [3] * 6 + [4] * 10, [3] * 14 + [5] * 11 + [6] * 9 + [7] * 14])
    target[1, -14:] = -100
    side = {
        "ref_logprob": -4 * torch.rand(2, TOKENS, generator=generator, dtype=torch.float64),
        "sample_weight": torch.rand(9, generator=generator, dtype=torch.float64)[ids],
    }
    side["ref_logprob"][0, :4] = torch.tensor([-60.0, 40.0, -30.0, 30.0])  # beyond the clamp
    return Batch(logits, target, ids, side)
