"""Every gate against an independent float64 computation, at TP 1, 2 and 4, with batch statistics over data parallel."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from eaft_megatron import vocab_parallel_token_loss
from eaft_megatron.loss import base_model_gates, gates, probability_gates, torch_impl
from eaft_megatron.methods import rows
from eaft_megatron.testing import run_distributed
from tests.loss.gate_cases import GATES, VOCAB, Batch, gate_batch


def _expected(name: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, slope, weight) [2, T] by numpy-minded formulas of the papers, on the whole vocabulary and batch."""
    gate, valid = GATES[name], batch.target != -100
    log_p = torch.log_softmax(batch.logits[..., :VOCAB], dim=-1)
    ce = -log_p.gather(-1, batch.target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    top = torch.softmax(batch.logits[..., :VOCAB].sort(dim=-1, descending=True).values[..., :20], dim=-1)
    entropy = torch.distributions.Categorical(probs=top).entropy()
    h = entropy / math.log(20)
    p = (-ce).exp()
    slope = None
    if name in ("sft", "sft-kl"):
        w = torch.ones_like(ce)
    elif name == "eaft":
        w = h
    elif name == "eaft cubed, norm 3":
        w = (entropy / 3.0) ** 3
    elif name == "sigmoid":
        w = 1 / (1 + torch.exp(-30 * (h - 0.17)))
    elif name == "threshold":
        w = (h > 0.5).double()
    elif name == "percentile":
        w = (h > np.percentile(h[valid].numpy(), 15.0)).double()
    elif name == "conflict mask":
        low_h = entropy < np.percentile(entropy[valid].numpy(), gate.percentile)
        low_p = p < np.percentile(p[valid].numpy(), gate.percentile)
        assert 0 < int((low_h & low_p & valid).sum()) < int(valid.sum()), "the case tests nothing"
        w = 1 - (low_h & low_p).double()
    elif name == "dft":
        w = p
    elif name == "talr":
        means = [float(ce[chosen].mean()) for i in range(8) if (chosen := (batch.sequence_ids == i) & valid).any()]
        assert len(means) == 7 - (not ((batch.sequence_ids == 6) & valid).any())
        w = (p ** (1 / np.median(means))).clamp(min=0.01)
    elif name == "talr, tau 2":
        w = p.sqrt().clamp(min=0.1)
    elif name == "flow":
        w = batch.side["sample_weight"]
    elif name == "deft":
        w = p ** log_p.exp().square().sum(-1)
    elif name.startswith("fixed conflict mask"):
        conflict = ((entropy / 3.0 if "norm" in name else h) < 0.4) & (p < 0.3)
        assert 0 < int((conflict & valid).sum()) < int(valid.sum()), "the case tests nothing"
        w = 1 - conflict.double()
    elif name.startswith("power"):
        w = (p ** float(name.split()[1])).clamp(max=4.0 if "-" in name else math.inf)
    elif name == "profit":
        w = (p >= 0.1).double()
    elif name == "trsft":
        w = torch.where(p < 0.1, p / 0.1, 1.0)
    else:
        w = _expected_of_base_model(name, p, batch.side["ref_logprob"].exp(), valid, batch.sequence_ids)
    loss, slope = w * ce, w
    if name in ("sft-kl", "asft"):
        beta = 0.5 if name == "sft-kl" else 0.05
        raw = batch.side["ref_logprob"] + ce
        d = raw.clamp(-20, 20)
        loss = loss + beta * (d.exp() - d - 1)
        slope = w + torch.where(raw == d, beta * (d.exp() - 1), 0.0)
    zero = torch.zeros_like(ce)
    return tuple(torch.where(valid, value, zero) for value in (loss, slope, w))


def _expected_of_base_model(name, p, p_ref, valid, ids) -> torch.Tensor:
    ratio = p / p_ref
    if name == "asft":
        return p
    if name == "psft":
        return torch.where(ratio < 1.28, ratio, 0.0)
    if name == "stm":
        return (1 / p_ref <= 2.5).double()
    if name == "iw-sft token":
        return ratio.clamp(0.2, 1.8)
    temperature = 2.0 if name.endswith("2") else 1.0
    w = torch.zeros_like(p)
    for i in range(8):
        inside = (ids == i) & valid
        w[inside] = min(math.exp(temperature * float(np.log(ratio[inside].numpy()).mean())), 16) if inside.any() else 0
    return w


def _answers(tp: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Ranks are tensor-parallel within a data-parallel half; every gate's loss, weight and full gradient."""
    rank, dp = dist.get_rank(), dist.get_world_size() // tp
    groups = [dist.new_group(list(range(half * tp, half * tp + tp))) for half in range(dp)]
    across = [dist.new_group(list(range(r, dp * tp, tp))) for r in range(tp)]
    half, slot = divmod(rank, tp)
    batch = gate_batch()
    width = 52 // tp
    out = {}
    for name, gate in GATES.items():
        logits = batch.logits[half, :, slot * width : (slot + 1) * width].to(dtype).requires_grad_()
        loss, stats = vocab_parallel_token_loss(
            logits,
            batch.target[half],
            gate,
            group=groups[half],
            side={key: value[half] for key, value in batch.side.items()},
            sequence_ids=batch.sequence_ids[half],
            reduce_group=across[slot],
            vocab_size=VOCAB,
            return_stats=True,
        )
        loss.sum().backward()
        out[name] = (half, slot, loss.detach(), stats.weight, logits.grad)
    return out


@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gates_match_their_papers(tp):
    """Loss, weight and gradient in float64 over DP 2 x TP: batch statistics see both halves, whatever TP."""
    ranks = run_distributed(_answers, 2 * tp, tp, torch.float64, timeout=120)
    batch = gate_batch()
    softmax = torch.softmax(batch.logits[..., :VOCAB], dim=-1)
    onehot = torch.nn.functional.one_hot(batch.target.clamp(min=0), VOCAB)
    for name in GATES:
        loss, slope, weight = _expected(name, batch)
        gradient = torch.nn.functional.pad(slope.unsqueeze(-1) * (softmax - onehot), (0, 2))
        for half in range(2):
            parts = sorted((r[name] for r in ranks if r[name][0] == half), key=lambda part: part[1])
            for part in parts:
                torch.testing.assert_close(
                    part[2], loss[half], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )
                torch.testing.assert_close(
                    part[3], weight[half], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )
                assert torch.equal(part[2], parts[0][2]), f"{name}: tensor-parallel ranks differ"
            actual = torch.cat([part[4] for part in parts], dim=-1)
            torch.testing.assert_close(actual, gradient[half], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_every_method_of_the_table_is_tested_here():
    """A row whose gate the cases above do not walk fails."""
    assert {method.gate for *_, method in rows()} <= {type(gate) for gate in GATES.values()}


def test_nothing_valid_and_nothing_at_all():
    """Batch statistics of no token: weight 0, loss 0, no error; and an empty batch."""
    for tokens in (3, 0):
        for gate in GATES.values():
            side = {"ref_logprob": torch.zeros(tokens), "sample_weight": torch.ones(tokens)}
            ids = torch.zeros(tokens, dtype=torch.int64)
            logits = torch.full((tokens, 30), float("nan"), requires_grad=True)
            target = torch.full((tokens,), -100)
            loss = vocab_parallel_token_loss(logits, target, gate, side=side, sequence_ids=ids)
            loss.sum().backward()
            assert loss.shape == (tokens,)
            assert loss.count_nonzero() == logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_surface(gate, bad):
    """A row with NaN or +inf has a NaN loss whatever the gate; other rows, where no batch statistic is used, do not."""
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = bad
    side = {"ref_logprob": torch.full((4,), -1.0), "sample_weight": torch.ones(4)}
    ids = torch.arange(4)
    loss = vocab_parallel_token_loss(logits, torch.arange(4), gate, side=side, sequence_ids=ids)
    assert loss[1].isnan()
    if not gate.needs_batch:
        assert loss[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_target_with_probability_zero_has_an_infinite_loss(gate):
    """Also where the weight is 0."""
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = float("-inf")
    logits.requires_grad_()
    side = {"ref_logprob": torch.full((2,), -1.0), "sample_weight": torch.zeros(2)}
    loss = vocab_parallel_token_loss(logits, torch.tensor([0, 1]), gate, side=side, sequence_ids=torch.arange(2))
    assert loss[0] == float("inf")
    assert loss[1].isfinite()
    loss.backward(torch.ones(2))
    assert logits.grad.isfinite().all()


class _NoHostSync(TorchDispatchMode):
    """Fails on what makes a GPU's stream wait for the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_no_gate_looks_at_a_value_on_the_host(gate, monkeypatch):
    """With the options and branches that a GPU has, no operator of either pass reads a number back."""
    monkeypatch.setattr(torch_impl, "_may_look_at", lambda values: False)
    side = {"ref_logprob": torch.full((4,), -1.0), "sample_weight": torch.ones(4)}
    ids, target = torch.arange(4), torch.tensor([1, -100, 3, 4])
    logits = torch.randn(4, 30, requires_grad=True)
    with _NoHostSync():
        loss = vocab_parallel_token_loss(
            logits, target, gate, side=side, sequence_ids=ids, validate=False, compact_ignored=False
        )
        loss.backward(torch.ones(4))


@dataclasses.dataclass(frozen=True)
class _Passing(gates.SFTGate):
    def __call__(self, stats, context):
        ones = torch.ones_like(stats.ce)
        return gates.GateOutput(stats.ce, ones, ones)


def test_a_gate_may_return_a_statistic_as_its_loss():
    """The loss stays differentiable."""
    logits = torch.randn(2, 9, requires_grad=True)
    vocab_parallel_token_loss(logits, torch.tensor([1, 2]), _Passing(), return_stats=True)[0].sum().backward()
    assert logits.grad.count_nonzero() == 18


def test_flow_sample_weights():
    """exp(-f / median f), the median of an even number being the mean of the two middle ones."""
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(gates.flow_sample_weights(losses), torch.exp(-losses / 2.5))
    for bad in ([], [1.0, float("nan")], [-1.0, 1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="sample_losses"):
            gates.flow_sample_weights(torch.tensor(bad))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gates.ThresholdGate(), "takes one of threshold"),
        (lambda: gates.ThresholdGate(threshold=0.1, percentile=15), "takes one of threshold"),
        (lambda: gates.ThresholdGate(percentile=101), r"percentile .* \[0, 100\]"),
        (lambda: gates.ThresholdGate(threshold=float("nan")), "threshold .* finite"),
        (lambda: gates.ConflictMaskGate(percentile=-1), "percentile"),
        (lambda: gates.SigmoidGate(steepness=0), "steepness"),
        (lambda: gates.TALRGate(tau=0), "--talr-tau"),
        (lambda: gates.TALRGate(min_weight=2), "--talr-min-weight"),
        (lambda: gates.SFTKLGate(beta=-1), "--sft-kl-beta"),
        (lambda: gates.ConflictMaskGate(conflict_entropy=0.1), "--eaft-conflict-probability.* together"),
        (lambda: gates.ConflictMaskGate(None, 15.0, 0.1, 0.1), "--eaft-percentile.*, or"),
        (lambda: gates.ConflictMaskGate(None, None, -1, 0.1), "--eaft-conflict-entropy"),
        (lambda: gates.ConflictMaskGate(None, None, 0.1, 2), "--eaft-conflict-probability"),
        (lambda: probability_gates.PowerGate(math.inf), "--power-exponent"),
        (lambda: probability_gates.PowerGate(max_weight=0), "--power-max-weight"),
        (lambda: probability_gates.ProFitGate(1.5), "--profit-threshold"),
        (lambda: probability_gates.TrSFTGate(0), "--trsft-threshold"),
        (lambda: base_model_gates.ASFTGate(-1), "--asft-kl"),
        (lambda: base_model_gates.PSFTGate(0), "--psft-clip"),
        (lambda: base_model_gates.STMGate(0.5), "--stm-perplexity"),
        (lambda: base_model_gates.IWSFTGate("row"), "--iw-sft-level"),
        (lambda: base_model_gates.IWSFTGate(temperature=-1), "--iw-sft-temperature"),
        (lambda: base_model_gates.IWSFTGate("token", 2.0), "--iw-sft-temperature.*remove it"),
        (lambda: _loss(base_model_gates.STMGate()), "side column 'ref_logprob'"),
        (lambda: _loss(base_model_gates.IWSFTGate(), side={"ref_logprob": torch.zeros(2)}), "needs sequence_ids"),
        (lambda: _loss(gates.FLOWGate()), "side column 'sample_weight'"),
        (lambda: _loss(gates.SFTKLGate()), "side column 'ref_logprob'"),
        (lambda: _loss(gates.TALRGate()), "needs sequence_ids"),
        (lambda: _loss(gates.TALRGate(), sequence_ids=torch.zeros(2)), "sequence_ids must be int64"),
        (
            lambda: _loss(gates.FLOWGate(), side={"sample_weight": torch.ones(3)}),
            r"shaped like target \(2,\), got \(3,\)",
        ),
        (lambda: _loss(lambda stats: stats), "gate must be a Gate"),
    ],
)
def test_bad_gates_are_value_errors(make, message):
    """Each names the flag or the column."""
    with pytest.raises(ValueError, match=message):
        make()


def _loss(gate, **kwargs):
    return vocab_parallel_token_loss(torch.zeros(2, 8), torch.tensor([0, 1]), gate, **kwargs)
