"""The objectives that others have released, written anew and differentiated by autograd, against this package's gates.

Where the value of an objective is not ``weight * ce``, its gradient is what is compared.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eaft_megatron import (
    ASFTGate,
    DEFTGate,
    EAFTGate,
    Gate,
    IWSFTGate,
    PowerGate,
    ProFitGate,
    PSFTGate,
    SFTGate,
    STMGate,
    TrSFTGate,
    vocab_parallel_token_loss,
)

TOKENS, VOCAB = 40, 64
SEQUENCES = torch.tensor([0] * 17 + [1] * 23)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, V], the base model's logits [T, V], labels [T]), float64; sure and unsure predictions."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = 2.5 * draw(TOKENS, 1).abs() * draw(TOKENS, VOCAB)
    labels = torch.where(draw(TOKENS) < 0.5, base.argmax(-1), torch.randint(0, VOCAB, (TOKENS,), generator=generator))
    return base + 0.7 * draw(TOKENS, VOCAB), base, labels


def _log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def _gradient(objective: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(objective, logits)
    return gradient


def _ours(gate: Gate, logits: Tensor, base: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss, its gradient)."""
    logits = logits.clone().requires_grad_()
    side = {"ref_logprob": _log_probability(base, labels)}
    loss = vocab_parallel_token_loss(logits, labels, gate, side=side, sequence_ids=SEQUENCES).mean()
    return loss.detach(), _gradient(loss, logits)


def _entropy_of_20(logits: Tensor, inside_log: float) -> Tensor:
    q = logits.detach().topk(20, -1).values.softmax(-1)
    return -(q * (q + inside_log).log()).sum(-1)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize(
    ("norm", "inside_log", "divisor"),
    [pytest.param(3.0, 0.0, 3.0, id="LLaMA-Factory"), pytest.param(1.0, 1e-10, 1.0, id="axolotl")],
)
def test_eaft_of_other_stacks(problem, alpha, norm, inside_log, divisor):
    """LLaMA-Factory: (H / 3) ** alpha. axolotl: H ** alpha in nats, with 1e-10 inside the logarithm."""
    logits, base, labels = problem
    given = logits.clone().requires_grad_()
    weight = (_entropy_of_20(given, inside_log) / divisor) ** alpha
    expected = (weight * -_log_probability(given, labels)).mean()
    loss, gradient = _ours(EAFTGate(alpha=alpha, entropy_norm=norm), logits, base, labels)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, _gradient(expected, given), rtol=1e-7, atol=1e-9)


def test_asft_of_its_authors(problem):
    """Theirs, p * ce + 0.05 KL(base || model) over the vocabulary, is made of our losses: the KL's part is the plain
    cross entropy on every label, weighted by the base model's probability of it, less the base model's entropy."""
    logits, base, labels = problem
    given = logits.clone().requires_grad_()
    logp, log_base = given.log_softmax(-1), base.log_softmax(-1)
    target = _log_probability(given, labels)
    divergence = (log_base.exp() * (log_base - logp)).sum(-1)
    expected = (target.detach().exp() * -target + 0.05 * divergence).mean()
    ours = logits.clone().requires_grad_()
    side = {"ref_logprob": _log_probability(base, labels)}
    weighted = vocab_parallel_token_loss(ours, labels, ASFTGate(kl=0), side=side)
    every = torch.arange(VOCAB).repeat(TOKENS)
    each = vocab_parallel_token_loss(ours.repeat_interleave(VOCAB, 0), every, SFTGate()).view(TOKENS, VOCAB)
    actual = (weighted + 0.05 * (log_base.exp() * (each + log_base)).sum(-1)).mean()
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(_gradient(actual, ours), _gradient(expected, given), rtol=1e-9, atol=1e-14)


def test_asft_as_proposed_for_nemo_rl(problem):
    """p * ce + 0.03 k3, where k3 is below their clamp of 10, gradient included."""
    logits, base, labels = problem
    given = logits.clone().requires_grad_()
    target = _log_probability(given, labels)
    x = (_log_probability(base, labels) - target).clamp(-20, 20)
    k3 = x.exp() - 1 - x
    assert float(k3.detach().max()) < 10
    expected = (target.detach().exp() * -target + 0.03 * k3.clamp(-10, 10)).mean()
    loss, gradient = _ours(ASFTGate(kl=0.03), logits, base, labels)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, _gradient(expected, given), rtol=1e-9, atol=1e-14)


def test_k3_estimates_the_reverse_divergence(problem):
    """Its mean over labels drawn from the model is KL(model || base), not the authors' KL(base || model)."""
    logits, base, _ = problem
    every = torch.arange(VOCAB).repeat(TOKENS)
    side = {"ref_logprob": base.log_softmax(-1).flatten()}
    rows = logits.repeat_interleave(VOCAB, 0)
    with_k3, without = (vocab_parallel_token_loss(rows, every, ASFTGate(kl=kl), side=side) for kl in (1.0, 0.0))
    log_p, log_base = logits.log_softmax(-1), base.log_softmax(-1)
    actual = (log_p.exp() * (with_k3 - without).view(TOKENS, VOCAB)).sum(-1)
    torch.testing.assert_close(actual, (log_p.exp() * (log_p - log_base)).sum(-1), rtol=1e-9, atol=1e-12)


def _deft(logp: Tensor, ref: Tensor, logits: Tensor) -> Tensor:
    a = logits.detach().softmax(-1).square().sum(-1)
    return (-((a * logp).exp() - 1) / (a + 1e-6)).mean()


def _iw_sft(logp: Tensor, ref: Tensor, logits: Tensor) -> Tensor:
    total = 0.0
    for i in (0, 1):
        inside = i == SEQUENCES
        weight = (logp - ref).detach()[inside].mean().exp().clamp(0, 16)
        total = total + (weight * -logp[inside]).sum()
    return total / TOKENS


RELEASED = {  # the gate -> the objective in log p, log p_ref and the logits, as its authors' code states it
    "power 8": (PowerGate(8.0), lambda logp, ref, _: ((1 - (8 * logp).exp()) / 8).mean()),
    "power 0.5": (PowerGate(0.5), lambda logp, ref, _: ((1 - (0.5 * logp).exp()) / 0.5).mean()),
    "power -0.5": (PowerGate(-0.5, max_weight=1e30), lambda logp, ref, _: ((1 - (-0.5 * logp).exp()) / -0.5).mean()),
    "profit": (ProFitGate(), lambda logp, ref, _: -logp[logp.exp() >= 0.1].sum() / TOKENS),
    "trsft": (TrSFTGate(), lambda logp, ref, _: -(logp.exp() / logp.detach().exp().clamp(min=0.1)).mean()),
    "deft": (DEFTGate(), _deft),
    "psft": (
        PSFTGate(),
        lambda logp, ref, _: -torch.minimum((logp - ref).exp(), (logp - ref).exp().clamp(1 - 0.2, 1 + 0.28)).mean(),
    ),
    "stm": (STMGate(), lambda logp, ref, _: -logp[(-ref).exp() <= 2.5].sum() / TOKENS),
    "iw-sft": (IWSFTGate(), _iw_sft),
    "iw-sft token": (
        IWSFTGate("token"),
        lambda logp, ref, _: ((logp - ref).detach().exp().clamp(0.2, 1.8) * -logp).mean(),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_gradients_of_released_objectives(problem, name):
    """To 1e-9; DEFT to the 1e-6 that its code adds to a denominator."""
    logits, base, labels = problem
    gate, objective = RELEASED[name]
    given = logits.clone().requires_grad_()
    expected = _gradient(objective(_log_probability(given, labels), _log_probability(base, labels), given), given)
    _, actual = _ours(gate, logits, base, labels)
    rtol = 1e-4 if name == "deft" else 1e-9
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-14)
    assert bool((actual.abs().sum(-1) == 0).any()) == (name in ("profit", "psft", "stm")), "the case tests nothing"
