"""Any shape and any values: the loss equals the oracle, and a second vocab-parallel implementation agrees."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from eaft_megatron import vocab_parallel_eaft_loss, vocab_parallel_topk_entropy
from eaft_megatron.loss.reference import reference_topk_entropy
from eaft_megatron.testing import run_distributed
from tests.loss.cases import Case, Outcome, assert_matches, build_cases

INF = float("inf")


@st.composite
def cases(draw) -> Case:
    """Small tensors with whatever is awkward: ties, -inf, huge and tiny values, few columns, ignored rows."""
    tokens, columns = draw(st.integers(0, 6)), draw(st.integers(1, 40))
    vocab = draw(st.integers(1, columns))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3]))
    logits = scale * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        logits = logits.round()  # ties
    holes = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    holes[:, 0] = False  # a row of nothing but -inf has no distribution
    logits[holes] = -INF
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    topk = draw(st.integers(1, 45))
    kwargs = {"vocab_size": vocab, "topk": topk, "alpha": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))}
    if min(topk, vocab) == 1 or draw(st.booleans()):
        kwargs["entropy_norm"] = draw(st.sampled_from([0.5, 3.0]))
    return Case(f"seed {seed}", logits.to(dtype), target, kwargs)


@settings(max_examples=300, deadline=None)
@given(case=cases(), compact=st.booleans(), inplace=st.booleans())
def test_any_input_equals_the_oracle(case, compact, inplace):
    """Loss, cross entropy, entropy, weight and gradient, with rows left out or not, gradient in place or not."""
    leaf = case.logits.clone().requires_grad_()
    loss, stats = vocab_parallel_eaft_loss(
        leaf * 1, case.target, compact_ignored=compact, inplace_backward=inplace, return_stats=True, **case.kwargs
    )
    loss.backward(case.upstream().to(loss.dtype))
    outcome = Outcome(loss.detach(), stats.ce, stats.entropy, stats.weight, leaf.grad)
    assert_matches(outcome, case, f"{case.logits.dtype}, {case.kwargs}")


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_entropy_is_never_negative_and_at_most_ln_k(case):
    """0 <= H <= ln K to the last place: a slightly negative H would be NaN under a power."""
    entropy = vocab_parallel_topk_entropy(case.logits, topk=case.kwargs["topk"], vocab_size=case.vocab_size)
    assert (entropy >= 0).all()
    assert (entropy <= math.log(min(case.kwargs["topk"], case.vocab_size)) * (1 + 1e-6)).all()


def test_near_certain_tokens_keep_their_digits():
    """H around 1e-6 nats to 1e-6 relative in float32, where the textbook log Z - S / Z has lost all of them."""
    logits = torch.zeros(1, 100)
    logits[0, 0] = 20.0
    actual = vocab_parallel_topk_entropy(logits).double()
    expected = reference_topk_entropy(logits.double())
    assert float(expected) < 1e-6
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def _naive_loss(logits, target, group, *, topk=20, alpha=1.0, entropy_norm=None, vocab_size=None, ignore_index=-100):
    """Second opinion, one collective per quantity: all-reduce of the maximum, of the sum of exponentials, of the
    target's logit; all-gather of the local top-K. Differentiable by autograd through the local shard."""
    rank, size, width = dist.get_rank(), dist.get_world_size(), logits.shape[-1]
    vocab_size = vocab_size or width * size
    column = rank * width + torch.arange(width)
    valid = target != ignore_index
    z = torch.where(valid.unsqueeze(-1), logits.to(torch.float64), 0.0).masked_fill(column >= vocab_size, -INF)
    maximum = z.detach().amax(-1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    e = (z - maximum.unsqueeze(-1)).exp()
    total = e.sum(-1).detach()
    dist.all_reduce(total)
    hit = column == target.unsqueeze(-1)
    chosen = torch.where(hit, z, 0.0).sum(-1)
    picked = chosen.detach().clone()
    dist.all_reduce(picked)
    ce = maximum + total.log() - picked
    local = z.detach().topk(min(topk, width), dim=-1).values
    parts = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(parts, local)
    top = torch.cat(parts, -1).topk(min(topk, vocab_size), dim=-1).values
    q = torch.softmax(top, -1)
    entropy = -(q * torch.where(q > 0, q, 1.0).log()).sum(-1)
    weight = (entropy / (entropy_norm or math.log(min(topk, vocab_size)))) ** alpha
    zero = torch.zeros_like(ce)
    slope = torch.where(valid, weight, zero)
    gradient = slope.unsqueeze(-1) * (e.detach() / total.unsqueeze(-1) - hit.double())
    return torch.where(valid, weight * ce, zero), slope, gradient.masked_fill(column >= vocab_size, 0.0)


def _compare_with_naive() -> int:
    compared = 0
    for case in build_cases(torch.float64):
        if (
            case.name in ("NaN and +inf", "one-hot rows", "-inf columns, some targets on them")
            or "alpha 0" in case.name
        ):
            continue  # infinities are the oracle's business
        logits = case.shard(dist.get_rank(), dist.get_world_size()).requires_grad_()
        expected, weight, gradient = _naive_loss(logits.detach(), case.target, dist.group.WORLD, **case.kwargs)
        for exchange in ("packed", "split"):
            loss, stats = vocab_parallel_eaft_loss(
                logits, case.target, group=dist.group.WORLD, exchange=exchange, return_stats=True, **case.kwargs
            )
            (actual,) = torch.autograd.grad(loss.sum(), logits)
            for ours, theirs in ((loss.detach(), expected), (stats.weight, weight), (actual, gradient)):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, n=case.name: f"{n}: {m}")
            compared += 1
    return compared


@pytest.mark.parametrize("size", [2, 4])
def test_a_naive_vocab_parallel_version_agrees(size):
    """Both exchanges against five separate collectives, in float64."""
    assert all(compared >= 20 for compared in run_distributed(_compare_with_naive, size, timeout=120))


def _entropy_beside_megatron() -> None:
    """Entropy first, then Megatron's cross entropy, which overwrites float32 logits: neither harms the other."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    full = 3 * torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 64, (6, 2), generator=torch.Generator().manual_seed(1))
    width = 64 // size
    shard = full[..., rank * width : (rank + 1) * width].contiguous()
    untouched = vocab_parallel_cross_entropy(shard.clone(), target)
    logits = shard.clone()
    entropy = vocab_parallel_topk_entropy(logits, group=dist.group.WORLD)
    assert torch.equal(logits, shard), "the entropy changed the logits"
    loss = vocab_parallel_cross_entropy(logits, target)
    torch.testing.assert_close(loss, untouched, rtol=0, atol=0)
    torch.testing.assert_close(entropy.double(), reference_topk_entropy(full.double()), rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits, shard), "Megatron no longer overwrites the logits: this test proves nothing"
    late = vocab_parallel_topk_entropy(logits, group=dist.group.WORLD)
    assert not torch.allclose(late, entropy, atol=1e-2), "order matters, and here it would not"
    parallel_state.destroy_model_parallel()


def test_entropy_keeps_out_of_megatrons_way():
    """vocab_parallel_topk_entropy called before a cross entropy that destroys its input, at TP 2."""
    pytest.importorskip("megatron.core")
    run_distributed(_entropy_beside_megatron, 2, timeout=90)


class _DestructiveCrossEntropy(torch.autograd.Function):
    """As Transformer Engine's did up to 2.17: forward leaves the gradient where the logits were."""

    @staticmethod
    def forward(ctx, logits, target):
        log_p = torch.log_softmax(logits, dim=-1)
        loss = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        logits.copy_(log_p.exp()).scatter_add_(-1, target.unsqueeze(-1), -torch.ones_like(loss).unsqueeze(-1))
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad.unsqueeze(-1), None


def test_entropy_as_a_weight_beside_a_destructive_cross_entropy():
    """A stack that keeps its own cross entropy: weight by the entropy taken first gives EAFT's loss and gradient."""
    logits = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(2))
    target = torch.arange(7)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = vocab_parallel_eaft_loss(ours, target)
    expected.sum().backward()
    given = theirs * 1
    weight = vocab_parallel_topk_entropy(given) / math.log(20)
    actual = weight * _DestructiveCrossEntropy.apply(given, target)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-5, atol=1e-6)
