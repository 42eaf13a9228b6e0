"""Output layer and loss in one, against the float64 reference and the plain path, over tensor-parallel processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaft_megatron import (
    SFTGate,
    vocab_parallel_eaft_loss,
    vocab_parallel_linear_eaft_loss,
    vocab_parallel_linear_token_loss,
    vocab_parallel_token_loss,
)
from eaft_megatron.loss import exchange, linear_backward
from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.testing import poisoned_memory, run_distributed
from tests.loss.gate_cases import GATES, TOKENS, VOCAB, gate_batch
from tests.loss.kernel_cases import DEVICE, where_kernels_run
from tests.worlds import once

SEQUENCE, BATCH, WIDTH, COLUMNS, TRUE = 8, 3, 6, 44, 41
VALID = 13  # of the 24 tokens
VARIANTS = {
    "ignored tokens dropped": dict(chunk_tokens=5),
    "every row": dict(chunk_tokens=5, drop_ignored=False, sequence_parallel=True),
    "a bound": dict(chunk_tokens=7, max_valid=VALID + 2),
    "a bound beyond the tokens": dict(chunk_tokens=7, max_valid=1000, sequence_parallel=True),
    "dropped, sequence parallel, split exchange": dict(chunk_tokens=6, sequence_parallel=True, exchange="split"),
    "one chunk, scaled": dict(chunk_tokens=1000, logits_scale=0.6),
}


def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden [S, B, H], weight [V, H], target [S, B], unequal upstream gradients); 10 ignored tokens in a row."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    weight = 2 * torch.randn(COLUMNS, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(0, TRUE, (SEQUENCE, BATCH), generator=generator)
    target.view(-1)[5:15] = -100  # with chunks of 5 and every row, two chunks of nothing
    target.view(-1)[20] = -100
    return hidden, weight, target, torch.rand(target.shape, generator=generator, dtype=torch.float64)


def _assert_near(actual: Tensor, expected: Tensor, what: str = "value") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12, msg=lambda message: f"{what}: {message}")


def _slice(tensor: Tensor, sharded: bool = True) -> Tensor:
    """This rank's part of the first dimension, as a tensor of its own."""
    if not sharded:
        return tensor.clone()
    return tensor.chunk(dist.get_world_size())[dist.get_rank()].clone()


def _sharded_answer(kwargs: dict) -> dict[str, Tensor]:
    """Ours on this rank: loss, stats, gradients of the hidden states (or our slice of them) and of our weight."""
    hidden, weight, target, upstream = _problem()
    hidden = _slice(hidden, kwargs.get("sequence_parallel", False)).requires_grad_()
    weight = _slice(weight).requires_grad_()
    with poisoned_memory() as poison:
        loss, stats = vocab_parallel_linear_eaft_loss(
            hidden, weight, target, group=dist.group.WORLD, vocab_size=TRUE, return_stats=True, **kwargs
        )
        loss.backward(upstream)
    assert poison.count > 0
    return {
        "loss": loss.detach(),
        "ce": stats.ce,
        "entropy": stats.entropy,
        "weight": stats.weight,
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


def _plain_answer(scale: float) -> dict[str, Tensor]:
    """The logits as a whole, then the loss: what the fused path must agree with."""
    hidden, weight, target, upstream = _problem()
    hidden, weight = hidden.requires_grad_(), _slice(weight).requires_grad_()
    logits = scale * (hidden @ weight.t())
    loss, stats = vocab_parallel_eaft_loss(logits, target, group=dist.group.WORLD, vocab_size=TRUE, return_stats=True)
    loss.backward(upstream)
    dist.all_reduce(hidden.grad)
    return {
        "loss": loss.detach(),
        "ce": stats.ce,
        "entropy": stats.entropy,
        "weight": stats.weight,
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


class _SumOverRanks(torch.autograd.Function):
    """Sum forward, identity backward: what follows a vocabulary-parallel embedding."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _tied_ids() -> Tensor:
    return torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH) * 5 % TRUE


def _tied_gradient(sequence_parallel: bool) -> Tensor:
    """Gradient of one Parameter that is embedding and output layer, sharded over the vocabulary."""
    _, weight, target, upstream = _problem()
    shared = torch.nn.Parameter(_slice(weight))
    ids = _tied_ids() - dist.get_rank() * len(shared)
    here = (ids >= 0) & (ids < len(shared))
    hidden = torch.tanh(_SumOverRanks.apply(shared[ids.clamp(0, len(shared) - 1)] * here.unsqueeze(-1)))
    if sequence_parallel:  # the other slices' gradients will come from the other ranks
        leaf = hidden.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    else:
        leaf = hidden
    loss = vocab_parallel_linear_eaft_loss(
        leaf,
        shared,
        target,
        group=dist.group.WORLD,
        vocab_size=TRUE,
        chunk_tokens=5,
        sequence_parallel=sequence_parallel,
    )
    loss.backward(upstream)
    if sequence_parallel:
        hidden.backward(exchange.all_gather_rows(leaf.grad, dist.group.WORLD).flatten(0, 1))
    return shared.grad


def _answer_all() -> dict:
    """Everything that needs ranks, in one run per tensor-parallel size."""
    out: dict = {name: _sharded_answer(kwargs) for name, kwargs in VARIANTS.items()}
    out["plain"] = {scale: _plain_answer(scale) for scale in (1.0, 0.6)}
    out["tied"] = [_tied_gradient(sequence_parallel) for sequence_parallel in (False, True)]
    if dist.get_world_size() == 4:
        out["gates"] = _gate_differences()
    out["collectives"] = _count_collectives()  # last: it wraps what it counts
    return out


SIZES = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


def _run(size: int) -> list[dict]:
    return run_distributed(_answer_all, size, timeout=120)


@pytest.fixture(scope="module")
def run() -> Callable:
    """What `_run` returns, computed once for each argument."""
    return once(_run)


def _reference(scale: float) -> dict[str, Tensor]:
    hidden, weight, target, upstream = _problem()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss, ce, entropy, gate = reference_eaft_loss(scale * (hidden @ weight.t()), target, vocab_size=TRUE)
    loss.backward(upstream)
    return {
        "loss": loss.detach(),
        "ce": ce.detach(),
        "entropy": entropy,
        "weight": gate,
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VARIANTS)
def test_matches_the_reference_and_the_plain_path(run, name, size):
    """Float64: loss, statistics and both gradients, with sequence parallelism and without, unequal upstream."""
    assert int((_problem()[2] != -100).sum()) == VALID
    kwargs = VARIANTS[name]
    scale = kwargs.get("logits_scale", 1.0)
    expected = _reference(scale)
    answers = [rank[name] for rank in run(size)]
    for field in ("loss", "ce", "entropy", "weight", "hidden.grad", "weight.grad"):
        parts, plain = [answer[field] for answer in answers], [rank["plain"][scale][field] for rank in run(size)]
        if field == "weight.grad" or (field == "hidden.grad" and kwargs.get("sequence_parallel")):
            parts = [torch.cat(parts)]
        if field == "weight.grad":
            plain = [torch.cat(plain)]
        for actual in parts:
            _assert_near(actual, expected[field], field)
            _assert_near(actual, plain[0], field)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_same_bits(run, size):
    """The loss and the weight of every tensor-parallel rank are bitwise equal."""
    for name, kwargs in VARIANTS.items():
        first = run(size)[0][name]
        for rank in run(size):
            assert torch.equal(rank[name]["weight"], first["weight"]), name
            assert kwargs.get("exchange") == "split" or torch.equal(rank[name]["loss"], first["loss"]), name


@pytest.mark.parametrize("size", SIZES)
def test_tied_embeddings(run, size):
    """One Parameter as embedding and output layer gets the unsharded gradient of both uses."""
    _, weight, target, upstream = _problem()
    shared = weight.requires_grad_()
    reference_eaft_loss(torch.tanh(shared[_tied_ids()]) @ shared.t(), target, vocab_size=TRUE)[0].backward(upstream)
    for which in range(2):
        actual = torch.cat([rank["tied"][which] for rank in run(size)])
        _assert_near(actual, shared.grad)


def _gate_differences() -> dict[str, float]:
    """Over DP 2 x TP 2, the largest difference between the fused and the plain path of each gate."""
    rank = dist.get_rank()
    groups, across = [[dist.new_group(ranks) for ranks in pair] for pair in ([[0, 1], [2, 3]], [[0, 2], [1, 3]])]
    half, slot = divmod(rank, 2)
    batch = gate_batch()
    generator = torch.Generator().manual_seed(half)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = 2 * torch.randn(52, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    upstream = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    common = dict(
        group=groups[half],
        side={key: value[half] for key, value in batch.side.items()},
        sequence_ids=batch.sequence_ids[half],
        reduce_group=across[slot],
        vocab_size=VOCAB,
        return_stats=True,
    )
    out = {}
    for name, gate in GATES.items():
        answers = []
        for fused in (True, False):
            states, mine = hidden.clone().requires_grad_(), weight.chunk(2)[slot].clone().requires_grad_()
            if fused:  # the halves have different numbers of valid tokens, so also of chunks
                loss, stats = vocab_parallel_linear_token_loss(
                    states, mine, batch.target[half], gate, chunk_tokens=3, **common
                )
            else:
                loss, stats = vocab_parallel_token_loss(states @ mine.t(), batch.target[half], gate, **common)
            loss.backward(upstream)
            if not fused:
                dist.all_reduce(states.grad, group=groups[half])
            answers.append([loss.detach(), stats.ce, stats.weight, states.grad, mine.grad])
        # Relative to the tensor's largest number: SFT-KL's slopes reach exp(20).
        out[name] = max(
            float((ours - plain).abs().max() / (1 + plain.abs().max())) for ours, plain in zip(*answers, strict=True)
        )
    return out


@pytest.mark.slow
def test_every_gate_over_chunks_and_data_parallel_ranks(run):
    """Percentiles and medians are those of the whole micro-batch over the reduce group, not of a chunk."""
    for rank in run(4):
        differences = rank["gates"]
        assert set(differences) == set(GATES)
        assert all(difference < 1e-11 for difference in differences.values()), differences


class _Noted:
    """A handle that notes when it is waited on."""

    def __init__(self, handle, calls: list[str]) -> None:
        self.handle, self.calls = handle, calls

    def wait(self) -> None:
        self.calls.append("waited")
        self.handle.wait()


def _count_collectives() -> list[tuple[list[str], list[str]]]:
    """Names of the torch.distributed calls made forward and backward, and "waited" for exchanges: plain, sequence
    parallel, nothing valid."""
    calls: list[str] = []

    def counted(original, name):
        def call(*args, **kwargs):
            calls.append(name)
            handle = original(*args, **kwargs)
            return _Noted(handle, calls) if name == "all_gather" else handle

        return call

    for owner, name in [(exchange, "_all_gather"), (linear_backward, "_reduce_scatter"), (dist, "all_reduce")]:
        setattr(owner, name, counted(getattr(owner, name), name.strip("_")))
    out = []
    for sequence_parallel, valid in ((False, 5), (True, 5), (False, 0)):
        hidden, weight, target, _ = _problem()
        target[target != -100] = torch.where(torch.arange(VALID) < valid, target[target != -100], -100)
        loss = vocab_parallel_linear_eaft_loss(
            _slice(hidden, sequence_parallel).requires_grad_(),
            _slice(weight).requires_grad_(),
            target,
            group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            chunk_tokens=2,
        )
        forward = list(calls)
        calls.clear()
        loss.sum().backward()
        out.append((forward, list(calls)))
        calls.clear()
    return out


def test_collectives_are_those_promised(run):
    """Five valid tokens in chunks of two: three exchanges, each on its way while the next chunk's logits are made and
    read; backward one sum a chunk, or gather and reduce-scatter."""
    gathered = ["all_gather", "waited"]
    exchanged = ["all_gather", *gathered, "all_gather", "waited", "waited"]
    for rank in run(2):
        plain, sequence_parallel, nothing = rank["collectives"]
        assert plain == (exchanged, ["all_reduce"] * 3)
        assert sequence_parallel == (gathered + exchanged, [*gathered, "reduce_scatter"])
        assert nothing == ([], [])


class _LiveMemory(TorchDispatchMode):
    """Bytes of the storages made within the block: those alive now, and the most that ever were; the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in [*args, *(kwargs or {}).values()] if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage(), before)
        return out

    def note(self, storage, before: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in before:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _memory(tokens: int, fused: bool, **kwargs) -> tuple[int, int, int]:
    """(largest tensor, peak, what lives between forward and backward) in bytes, gradients included."""
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(2048, 4, requires_grad=True)
    target = torch.arange(tokens) % 2048
    with _LiveMemory() as memory:
        if fused:
            loss = vocab_parallel_linear_eaft_loss(hidden, weight, target, chunk_tokens=32, **kwargs)
        else:
            loss = vocab_parallel_eaft_loss(hidden @ weight.t(), target)
        between = memory.live
        loss.sum().backward()
    return memory.largest, memory.peak, between


@pytest.mark.parametrize("kwargs", [{}, {"drop_ignored": False}, {"max_valid": 2000}], ids=str)
def test_memory_is_flat_in_tokens(kwargs):
    """Twice the tokens, the same buffers: numbers per token are all that is added, and no logits wait for backward."""
    chunk = 32 * 2048 * 4
    (largest, peak, between), (largest_twice, peak_twice, between_twice) = (
        _memory(tokens, True, **kwargs) for tokens in (1024, 2048)
    )
    assert largest == largest_twice == chunk
    assert (between_twice - between) / 1024 <= 64
    assert (peak_twice - peak) / 1024 <= 160 + 4 * 4 * 4  # numbers per token, and some rows of hidden states
    assert peak_twice < 4 * chunk
    assert between_twice < chunk / 2


def test_the_memory_probe_sees_whole_logits():
    """The plain path, which holds them, fails every condition above."""
    largest, peak, between = _memory(2048, False)
    assert largest == between - between % (2048 * 2048 * 4) == 2048 * 2048 * 4
    assert peak >= 2 * largest


def _fused_weight(main_grad_dtype: torch.dtype, dtype: torch.dtype = torch.float64, **attributes):
    weight = torch.nn.Parameter(_problem()[1].to(dtype))
    weight.main_grad = torch.full(weight.shape, 3.0, dtype=main_grad_dtype)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


def test_main_grad_is_added_to():
    """With the fusion the gradient goes into main_grad, twice if asked twice, and autograd gets none."""
    hidden, _, target, upstream = _problem()
    weight = _fused_weight(torch.float64)
    for _ in range(2):
        loss = vocab_parallel_linear_eaft_loss(
            hidden, weight, target, vocab_size=TRUE, chunk_tokens=5, gradient_accumulation_fusion=True
        )
        loss.backward(upstream)
    _assert_near(weight.main_grad, 3 + 2 * _reference(1.0)["weight.grad"])
    assert weight.grad is None


@pytest.mark.parametrize("zeros", [False, True])
def test_main_grad_by_megatrons_protocol(zeros):
    """grad_added_to_main_grad is set; autograd gets a gradient to fire hooks with, zeros where somebody adds to it."""
    hidden, _, target, upstream = _problem()
    weight = _fused_weight(torch.float64, grad_added_to_main_grad=False, zero_out_wgrad=zeros)
    fired = []
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad_added_to_main_grad))
    loss = vocab_parallel_linear_eaft_loss(hidden, weight, target, vocab_size=TRUE, gradient_accumulation_fusion=True)
    loss.backward(upstream)
    assert fired == [True] and weight.grad.shape == weight.shape
    assert not zeros or weight.grad.count_nonzero() == 0
    _assert_near(weight.main_grad, 3 + _reference(1.0)["weight.grad"])


def test_half_precision_sums_the_weight_gradient_in_float32(monkeypatch):
    """bf16, one token a chunk: the error stays that of one rounding, into main_grad and without; in bf16 it grows."""
    monkeypatch.setattr(linear_backward, "_WEIGHT_ROWS", 16)  # several blocks, the last one short
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, WIDTH, generator=generator).bfloat16()
    target = torch.randint(0, COLUMNS, (256,), generator=generator)
    weight = torch.randn(COLUMNS, WIDTH, generator=generator).bfloat16()
    exact = weight.double().requires_grad_()
    reference_eaft_loss(hidden.double() @ exact.t(), target)[0].sum().backward()

    def error(**kwargs) -> float:
        parameter = weight.clone().requires_grad_()
        parameter.main_grad = torch.zeros(weight.shape)
        vocab_parallel_linear_eaft_loss(hidden, parameter, target, chunk_tokens=1, **kwargs).sum().backward()
        gradient = parameter.main_grad if parameter.grad is None else parameter.grad
        return float((gradient.double() - exact.grad).norm() / exact.grad.norm())

    assert error() < 4e-3 and error(gradient_accumulation_fusion=True) < 4e-3
    assert error(weight_grad_dtype=torch.bfloat16) > 2 * error()


@pytest.mark.parametrize("kwargs", [{}, {"drop_ignored": False}, {"max_valid": 20}], ids=str)
def test_ignored_tokens_pass_nothing_on(kwargs):
    """NaN in an ignored token's hidden states and upstream gradient reaches no other token and not the weight."""
    hidden, weight, target, upstream = _problem()
    hidden.view(-1, WIDTH)[7] = float("nan")
    upstream.view(-1)[8] = float("nan")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = vocab_parallel_linear_eaft_loss(hidden, weight, target, vocab_size=TRUE, chunk_tokens=4, **kwargs)
    loss.backward(upstream)
    expected = _reference(1.0)
    _assert_near(loss.detach(), expected["loss"])
    _assert_near(hidden.grad, expected["hidden.grad"])
    _assert_near(weight.grad, expected["weight.grad"])


def test_nan_in_one_row_is_seen_there_and_in_the_weight():
    """A token that counts and holds NaN has a NaN loss and gradient; the other tokens' are untouched."""
    hidden, weight, target, upstream = _problem()
    hidden.view(-1, WIDTH)[2] = float("nan")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = vocab_parallel_linear_eaft_loss(hidden, weight, target, vocab_size=TRUE, chunk_tokens=4)
    loss.backward(upstream)
    expected = _reference(1.0)
    others = torch.arange(24) != 2
    assert loss.view(-1)[2].isnan() and hidden.grad.view(-1, WIDTH)[2].isnan().all() and weight.grad.isnan().any()
    for actual, name in ((loss.detach(), "loss"), (hidden.grad, "hidden.grad")):
        _assert_near(actual.flatten(0, 1)[others], expected[name].flatten(0, 1)[others])


def test_a_bound_too_low_is_not_silent():
    """Tokens that count and lie beyond max_valid have a NaN loss; those within it their own."""
    hidden, weight, target, _ = _problem()
    loss = vocab_parallel_linear_eaft_loss(hidden, weight, target, vocab_size=TRUE, max_valid=VALID - 2)
    where = (target.view(-1) != -100).nonzero().squeeze(1)
    assert loss.view(-1).isnan().nonzero().squeeze(1).tolist() == where[-2:].tolist()
    torch.testing.assert_close(loss.view(-1)[where[:-2]], _reference(1.0)["loss"].view(-1)[where[:-2]])


def test_gradcheck_and_what_needs_no_gradient():
    """Finite differences with weight 1; a frozen weight or detached hidden states get none, the other still does."""
    hidden, weight, target, _ = _problem()
    hidden, target = hidden[:2].clone().requires_grad_(), target[:2]
    weight = weight[:9].clone().requires_grad_()
    target = target.clamp(max=8)

    def loss(states, matrix):
        return vocab_parallel_linear_token_loss(
            states, matrix, target, SFTGate(), chunk_tokens=4, logits_scale=0.7, drop_ignored=False
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    (both,) = torch.autograd.grad(loss(hidden, weight).sum(), weight)
    (alone,) = torch.autograd.grad(loss(hidden.detach(), weight).sum(), weight)
    torch.testing.assert_close(alone, both, rtol=0, atol=0)
    (frozen,) = torch.autograd.grad(loss(hidden, weight.detach()).sum(), hidden)
    assert frozen.count_nonzero() > 0


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_valid_and_nothing_at_all(tokens):
    """No row is computed; loss and gradients are zeros of the right shapes, for every gate."""
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    target = torch.full((tokens,), -100)
    for gate in GATES.values():
        side = {"ref_logprob": torch.zeros(tokens), "sample_weight": torch.ones(tokens)}
        ids = torch.zeros(tokens, dtype=torch.int64)
        loss = vocab_parallel_linear_token_loss(hidden, weight, target, gate, side=side, sequence_ids=ids)
        loss.sum().backward()
        assert loss.shape == (tokens,) and loss.dtype == torch.float32
        assert loss.count_nonzero() == hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def _by_kernels() -> list[list[Tensor]]:
    """Loss and gradients by the kernels and by plain torch, float32, ignored rows among the others."""
    hidden, weight, target, upstream = (tensor.to(DEVICE) for tensor in _problem())
    out = []
    for impl in ("triton", "torch"):
        states, matrix = hidden[:3].float().requires_grad_(), weight.float().requires_grad_()
        loss = vocab_parallel_linear_eaft_loss(
            states, matrix, target[:3], vocab_size=TRUE, chunk_tokens=4, impl=impl, drop_ignored=False, logits_scale=0.5
        )
        loss.backward(upstream[:3].float())
        out.append([tensor.detach().cpu() for tensor in (loss, states.grad, matrix.grad)])
    return out


def test_the_kernels_take_the_chunks():
    """impl="triton" on each chunk, its gradient written over the chunk's logits, equals plain torch."""
    pytest.importorskip("triton", "3.4" if DEVICE == "cuda" else "3.9")
    kernels, plain = where_kernels_run(_by_kernels)
    torch.testing.assert_close(kernels, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": torch.zeros(8, 3)}, r"hidden must be \[\.\.\., H\] and weight \[V_local, H\]"),
        ({"weight": torch.zeros(8, 4, dtype=torch.float64)}, "one dtype and one device"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must have the shape of hidden .*\(2,\), got \(3,\)"),
        ({"target": torch.tensor([0, 8])}, r"target\[1\] = 8 is outside the vocabulary of 8"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1"),
        ({"logits_scale": float("inf")}, "logits_scale must be finite"),
        ({"max_valid": -1}, "max_valid must be >= 0"),
        ({"max_valid": 1, "drop_ignored": True}, "takes the place of drop_ignored"),
        ({"gradient_accumulation_fusion": True}, "needs weight.main_grad"),
        ({"topk": 0}, "topk .* must be >= 1"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_bad_input_is_a_value_error(kwargs, message):
    """Each mistake is named, with the shapes or the value in the message."""
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(8, 4), "target": torch.tensor([0, 1])} | kwargs
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_eaft_loss(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)
