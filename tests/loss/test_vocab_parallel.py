"""The vocab-parallel EAFT loss against the float64 reference, over real tensor-parallel processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from eaft_megatron import SFTGate, vocab_parallel_eaft_loss, vocab_parallel_token_loss, vocab_parallel_topk_entropy
from eaft_megatron.loss import exchange as exchange_module
from eaft_megatron.loss import torch_impl
from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.testing import poisoned_memory, run_distributed
from tests.loss.cases import Case, Outcome, assert_matches, build_cases, reference_outcome
from tests.worlds import once

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _shard_outcome(case: Case, exchange: str, inplace: bool) -> dict:
    """One rank's answer to one case, with the gradient of its own columns."""
    rank, size = dist.get_rank(), dist.get_world_size()
    leaf = case.shard(rank, size).requires_grad_()
    logits = leaf * 1  # as a model's output: not a leaf, so that it may be overwritten
    before = logits.detach().clone()
    with poisoned_memory():
        loss, stats = vocab_parallel_eaft_loss(
            logits,
            case.target,
            group=dist.group.WORLD,
            exchange=exchange,
            inplace_backward=inplace,
            compact_ignored=exchange == "packed",  # so that both ways are compared with the oracle and each other
            return_stats=True,
            **case.kwargs,
        )
        loss.backward(case.upstream().to(loss.dtype))
    untouched = torch.equal(before.view(torch.uint8), logits.detach().contiguous().view(torch.uint8))
    entropy = vocab_parallel_topk_entropy(
        before, group=dist.group.WORLD, topk=case.kwargs.get("topk", 20), vocab_size=case.kwargs.get("vocab_size")
    )
    return {
        "loss": loss.detach(),
        "ce": stats.ce,
        "entropy": stats.entropy,
        "weight": stats.weight,
        "gradient": leaf.grad,
        "untouched": untouched,
        "entropy alone": entropy,
    }


def _answer_all() -> dict[torch.dtype, dict[tuple[str, str], dict]]:
    """All cases in all dtypes with both exchanges on this rank; chunks of three rows, so that there are several."""
    torch_impl._CHUNK_NUMBERS_CPU = 3 * 128
    return {
        dtype: {
            (case.name, exchange): _shard_outcome(case, exchange, inplace=number % 2 == 0)
            for number, case in enumerate(build_cases(dtype))
            for exchange in ("packed", "split")
        }
        for dtype in DTYPES
    }


def _run(size: int) -> list[dict]:
    return run_distributed(_answer_all, size, timeout=180)


@pytest.fixture(scope="module")
def run() -> Callable:
    """What `_run` returns, computed once for each argument."""
    return once(_run)


def _answers(run, size: int, dtype: torch.dtype) -> list[dict]:
    return [rank[dtype] for rank in run(size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_matches_the_float64_reference(run, size, dtype):
    """Loss, cross entropy, entropy, weight and gradient of every case at TP 1, 2 and 4, with both exchanges."""
    ranks = _answers(run, size, dtype)
    for case in build_cases(dtype):
        for exchange in ("packed", "split"):
            answers = [rank[case.name, exchange] for rank in ranks]
            gradient = torch.cat([answer["gradient"] for answer in answers], dim=-1)
            fields = {name: answers[0][name] for name in ("loss", "ce", "entropy", "weight")}
            assert_matches(Outcome(**fields, gradient=gradient), case, f"tp {size}, {exchange}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_is_bitwise_equal_on_all_ranks_and_tp_sizes(run, dtype):
    """Every rank of every TP size reports the same bits for the weight; within one TP size also for the loss."""
    for case in build_cases(dtype):
        weight = _answers(run, 1, dtype)[0][case.name, "packed"]["weight"]
        for size in (1, 2, 4):
            loss = _answers(run, size, dtype)[0][case.name, "packed"]["loss"]
            for answers in _answers(run, size, dtype):
                for exchange in ("packed", "split"):
                    actual = answers[case.name, exchange]["weight"]
                    torch.testing.assert_close(actual, weight, rtol=0, atol=0, equal_nan=True, msg=case.name)
                actual = answers[case.name, "packed"]["loss"]
                torch.testing.assert_close(actual, loss, rtol=0, atol=0, equal_nan=True, msg=case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_untouched_unless_inplace_is_asked_for(run, dtype):
    """With inplace_backward=False the logits keep every bit, NaN payloads included."""
    kept = 0
    for number, case in enumerate(build_cases(dtype)):
        if number % 2 == 1:
            kept += all(answers[case.name, "packed"]["untouched"] for answers in _answers(run, 2, dtype))
    assert kept == len(build_cases(dtype)) // 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_entropy_alone_equals_the_loss_own_entropy(run, size):
    """vocab_parallel_topk_entropy gives the bits of TokenStats.entropy at valid tokens."""
    for case in build_cases(torch.float32):
        valid = case.target != case.kwargs.get("ignore_index", -100)
        for answers in _answers(run, size, torch.float32):
            answer = answers[case.name, "packed"]
            torch.testing.assert_close(
                answer["entropy alone"][valid], answer["entropy"][valid], rtol=0, atol=0, equal_nan=True, msg=case.name
            )


def test_inplace_backward_writes_into_the_logits_and_refuses_a_second_backward():
    """The gradient takes the logits' own storage; a second backward through lost logits raises."""
    leaf = torch.randn(4, 50, requires_grad=True)
    logits = leaf * 1
    loss = vocab_parallel_eaft_loss(logits, torch.arange(4), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), leaf.grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_released_code_is_reproduced_with_norm_3():
    """The authors' formula (fixed 20 logits, divisor 3.0, detached), written here by itself, gives the same numbers."""
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(64, 1000, generator=generator)
    target = torch.randint(0, 1000, (64,), generator=generator)
    target[::5] = -100
    keep = target != -100
    top = torch.topk(logits[keep], 20, dim=-1).values
    log_p = top - torch.logsumexp(top, dim=-1, keepdim=True)
    weight = -(log_p.exp() * log_p).sum(dim=-1) / 3.0
    expected = weight * torch.nn.functional.cross_entropy(logits[keep], target[keep], reduction="none")
    actual, stats = vocab_parallel_eaft_loss(logits, target, entropy_norm=3.0, return_stats=True)
    torch.testing.assert_close(stats.weight[keep], weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual[keep], expected, rtol=1e-5, atol=1e-6)
    assert actual[~keep].count_nonzero() == 0


def test_gradcheck_with_the_weight_held_fixed():
    """Finite differences of weight * cross entropy, the weight a constant, in float64."""
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 8])
    _, stats = vocab_parallel_eaft_loss(logits, target, topk=4, return_stats=True)

    class Fixed(SFTGate):
        def weight(self, *_):
            return stats.weight

    assert torch.autograd.gradcheck(lambda x: vocab_parallel_token_loss(x, target, Fixed()), (logits,))
    # The fixed weight's gradient is EAFT's own gradient: nothing flows through the weight.
    (fixed,) = torch.autograd.grad(vocab_parallel_token_loss(logits, target, Fixed()).sum(), logits)
    (eaft,) = torch.autograd.grad(vocab_parallel_eaft_loss(logits, target, topk=4).sum(), logits)
    torch.testing.assert_close(eaft, fixed, rtol=0, atol=0)


def test_ignored_tokens_pass_nothing_on():
    """A NaN upstream gradient at an ignored token, or NaN in its logits, reaches no gradient."""
    logits = torch.randn(2, 30)
    logits[0] = float("nan")
    logits.requires_grad_()
    loss = vocab_parallel_eaft_loss(logits, torch.tensor([-100, 3]))
    loss.backward(torch.tensor([float("nan"), 1.0]))
    assert loss[0] == 0 and logits.grad[0].count_nonzero() == 0
    assert logits.grad[1].isfinite().all() and logits.grad[1].count_nonzero() == 30


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"logits": torch.zeros(2, 8, dtype=torch.int32)}, "logits must be bfloat16"),
        ({"target": torch.zeros(2, dtype=torch.int32)}, "target must be int64"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"logits \(2, 8\), target \(3,\)"),
        ({"target": torch.tensor([0, 8])}, r"target\[1\] = 8 is outside the vocabulary of 8"),
        ({"target": torch.tensor([0, -1])}, r"target\[1\] = -1 is outside"),
        ({"target": torch.tensor([0, 6]), "vocab_size": 6}, r"target\[1\] = 6 is outside the vocabulary of 6"),
        ({"topk": 0}, "topk .* must be >= 1"),
        ({"topk": 1}, "give entropy_norm"),
        ({"vocab_size": 9}, r"must lie in \[1, 8\]"),
        ({"alpha": -1.0}, "alpha .* must be finite and >= 0"),
        ({"alpha": float("nan")}, "alpha .* must be finite"),
        ({"entropy_norm": 0.0}, "entropy_norm .* must be finite and > 0"),
        ({"impl": "cuda"}, "impl must be"),
        ({"exchange": "ring"}, "exchange must be"),
    ],
)
def test_bad_input_is_a_value_error(kwargs, message):
    """Each mistake is named, with the shapes or the value in the message."""
    kwargs = dict(kwargs)
    logits, target = kwargs.pop("logits", torch.zeros(2, 8)), kwargs.pop("target", torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        vocab_parallel_eaft_loss(logits, target, **kwargs)


def test_an_unchecked_target_outside_the_vocabulary_gives_nan():
    """With validate=False (the default on a GPU) such a token's loss is NaN and no other token's is touched."""
    loss = vocab_parallel_eaft_loss(torch.randn(3, 8), torch.tensor([1, 8, -1]), validate=False)
    assert loss.isnan().tolist() == [False, True, True]


def _raise_on_every_rank() -> str:
    try:
        vocab_parallel_eaft_loss(torch.zeros(2, 4), torch.tensor([0, 9]), group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_bad_target_raises_on_every_rank():
    """No rank is left waiting in a collective."""
    messages = run_distributed(_raise_on_every_rank, 2, timeout=60)
    assert messages[0] == messages[1] and "target[1] = 9 is outside the vocabulary of 8" in messages[0]


def _counted(original, name: str, calls: list[str]):
    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    return counted


def _count_collectives(exchange: str) -> tuple[list[str], list[str]]:
    """Names of the torch.distributed calls made forward and backward."""
    calls: list[str] = []
    for owner, name in [
        (exchange_module, "_all_gather"),
        (dist, "all_reduce"),
        (dist, "all_gather"),
        (dist, "broadcast"),
    ]:
        setattr(owner, name, _counted(getattr(owner, name), name.strip("_"), calls))
    logits = torch.randn(5, 16, requires_grad=True)
    loss = vocab_parallel_eaft_loss(logits, torch.arange(5), group=dist.group.WORLD, exchange=exchange)
    forward = list(calls)
    calls.clear()
    loss.sum().backward()
    return forward, calls


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [("packed", ["all_gather"]), ("split", ["all_gather", "all_reduce"])],
)
def test_collectives_are_as_few_as_promised(exchange, expected):
    """Packed: one all-gather. Split: one all-gather and one all-reduce. Backward: none."""
    for forward, backward in run_distributed(_count_collectives, 2, exchange, timeout=60):
        assert forward == expected and backward == []


@pytest.mark.parametrize("layout", ["every second", "runs", "one in four"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_left_out_in_any_layout(monkeypatch, dtype, layout):
    """Single rows are copied together, runs are not: the loss and gradient of every row walked, in place or not."""
    monkeypatch.setattr(torch_impl, "_CHUNK_NUMBERS_CPU", 10 * 1500)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 1500, generator=generator)
    logits[::9] = logits[::9].round()  # ties: more candidates than K
    target = torch.randint(0, 1500, (64,), generator=generator)
    number = torch.arange(64)
    target[{"every second": number % 2 == 0, "runs": number % 32 < 14, "one in four": number % 4 > 0}[layout]] = -100
    outcomes = []
    for compact, inplace in ((False, False), (True, False), (True, True)):
        leaf = logits.to(dtype).requires_grad_()
        loss, stats = vocab_parallel_eaft_loss(
            leaf * 1, target, topk=4, compact_ignored=compact, inplace_backward=inplace, return_stats=True
        )
        loss.sum().backward()
        outcomes.append((loss.detach(), stats.entropy, leaf.grad))
    for outcome in outcomes[1:]:
        for actual, expected in zip(outcome, outcomes[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    reference = reference_eaft_loss(logits.to(dtype).double(), target, topk=4)
    torch.testing.assert_close(outcomes[0][0].double(), reference[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [64, 4096])
def test_logits_at_the_ends_of_float32(size):
    """A vocabulary masked by finfo.min, in part or as a whole, and a row of huge logits: finite and right."""
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    logits = torch.randn(4, size)
    logits[0] = lowest
    logits[1, 5:] = lowest
    logits[2] = highest
    logits[3, 1] = highest
    target = torch.tensor([3, 2, 1, 1])
    leaf = logits.clone().requires_grad_()
    loss, stats = vocab_parallel_eaft_loss(leaf, target, topk=4, return_stats=True)
    loss.sum().backward()
    exact = logits.double()
    exact = (exact - exact.amax(dim=1, keepdim=True)).requires_grad_()  # or float64 would lose ln V beside 3e38
    expected, ce, _, _ = reference_eaft_loss(exact, target, topk=4)
    expected.sum().backward()
    torch.testing.assert_close(stats.ce.double(), ce.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_the_comparison_itself_can_fail():
    """assert_matches rejects a weight that is off by one part in ten thousand."""
    case = build_cases(torch.float32)[0]
    outcome = reference_outcome(case)
    assert_matches(outcome, case, "reference")
    outcome.weight *= 1.0001
    with pytest.raises(AssertionError, match="weight off by"):
        assert_matches(outcome, case, "reference")
