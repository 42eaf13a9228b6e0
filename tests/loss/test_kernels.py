"""The Triton kernels against torch.topk, the float64 reference and the torch path: on a GPU, or interpreted."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from eaft_megatron import EAFTGate, vocab_parallel_eaft_loss, vocab_parallel_token_loss, vocab_parallel_topk_entropy
from eaft_megatron.loss.exchange import Message
from eaft_megatron.testing import run_distributed
from tests.loss.cases import Case, Outcome, assert_matches, build_cases, reference_outcome
from tests.loss.kernel_cases import DEVICE, INF, adversarial_rows, shard_rows, where_kernels_run
from tests.worlds import once

# Interpreters before 3.9 fail with numpy 2.4 ("only 0-dimensional arrays can be converted"); the kernels do not mind.
NEEDED = "3.4" if DEVICE == "cuda" else "3.9"
pytest.importorskip(
    "triton", NEEDED, reason=f"the kernels are tested with Triton {NEEDED} or later (pip install triton)"
)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_K = [1, 2, 5, 20] + ([64, 128] if DEVICE == "cuda" else [])
SIZES = (1, 2, 4, 8) if DEVICE == "cuda" else (1, 4)
# The interpreter takes a tenth of a second and more for a row; without a GPU the other cases and dtypes are slow tests.
FAST_CASES = {
    torch.float32: {
        "ranks with nothing but padding",
        "one-hot rows",
        "vocabulary smaller than K",
        "K = 1 with a norm",
        "no tokens at all",
        "NaN and +inf",
        "other ignore_index",
    },
    torch.bfloat16: {"vocabulary of 257, padded on the last rank", "all tokens ignored", "NaN and +inf"},
    torch.float16: {"one-hot rows"},
}


def _statistics(rows, target, k, buckets, *, width, start=0, squares=True):
    """``[N, k + 3]`` of the streaming kernel with few and small buckets, so that a short row has many steps."""
    from eaft_megatron.loss.kernels.statistics import launch_statistics
    from eaft_megatron.loss.kernels.tuning import StreamShape

    message = Message.empty(rows.shape[0], k, 1 + squares, rows.dtype, rows.device)
    shape = StreamShape(buckets, 16 // rows.dtype.itemsize, 2)
    launch_statistics(
        rows, target, message.logits, message.sums, start=start, width=width, k=k, ignore_index=-100, shape=shape
    )
    logits, sums = message.logits.float(), message.sums.T
    return torch.cat([logits[:, :k], sums[:, :1], logits[:, k:], sums[:, 1:]], dim=1).cpu()


def _adversarial(dtypes, every_k, buckets: int, columns: int, width: int) -> dict:
    """The kernel's answers on all adversarial rows in one call, from rows at an unaligned stride."""
    warnings.simplefilter("ignore")  # numpy's, of -inf minus -inf in the interpreter
    out = {}
    for dtype in dtypes:
        rows = torch.stack(list(adversarial_rows(width, buckets, 16 // dtype.itemsize).values()))
        storage = torch.full((rows.shape[0] * (columns + 3) + 1,), float("nan"), dtype=dtype)
        storage = storage[1:].view(rows.shape[0], columns + 3)  # an odd base as well as an odd stride
        storage[:, :width] = rows
        target = torch.arange(rows.shape[0]) % width
        for k in every_k:
            given = storage.to(DEVICE)[:, :columns]
            out[dtype, k] = _statistics(given, target.to(DEVICE), k, buckets, width=width)
    return out


def _check_adversarial(answers: dict, buckets: int, width: int) -> None:
    for (dtype, k), actual in answers.items():
        named = adversarial_rows(width, buckets, 16 // dtype.itemsize)
        rows = torch.stack(list(named.values())).to(dtype)
        expected = rows.topk(min(k, width), dim=1).values.float()
        wrong = [name for name, a, e in zip(named, actual, expected, strict=True) if not torch.equal(a[: len(e)], e)]
        assert not wrong, f"{dtype}, K = {k}: {wrong}"
        assert (actual[:, min(k, width) : k] == -INF).all()
        wide = rows.double()
        relative = (wide - wide.amax(1, keepdim=True)).exp().nan_to_num(0.0)  # a row of nothing sums to 0
        torch.testing.assert_close(actual[:, k].double(), relative.sum(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(actual[:, k + 2].double(), relative.square().sum(1), rtol=2e-6, atol=0)
        target = torch.arange(len(named)) % width
        assert torch.equal(actual[:, k + 1], rows[torch.arange(len(named)), target].float())


def test_the_largest_k_are_exact_whatever_the_data():
    """Equal to torch.topk as a sorted list, bit for bit; sums of exponentials and of squares; the target's logit."""
    columns, width, buckets = 171, 165, 4
    answers = where_kernels_run(_adversarial, DTYPES[:2], [4], buckets, columns, width)
    _check_adversarial(answers, buckets, width)


@pytest.mark.slow
def test_the_largest_k_are_exact_for_every_k_and_dtype():
    """The same for K = 1, 2, 20 (128 on a GPU) and fp16, with more steps per bucket than places to keep them."""
    for columns, width, buckets in ((203, 197, 4), (160, 9, 4), (64, 1, 4)):
        answers = where_kernels_run(_adversarial, DTYPES, EVERY_K, buckets, columns, width)
        _check_adversarial(answers, buckets, width)


def _gradients_of_odd_rows() -> dict:
    """The gradient kernel with small blocks on rows of any alignment: the storage around them, and the truth."""
    from eaft_megatron.loss.kernels import gradient

    gradient.gradient_block = lambda dtype: (32, 1)
    out, (tokens, columns, width) = {}, (5, 101, 97)
    generator = torch.Generator().manual_seed(6)
    values = 3 * torch.randn(tokens, columns, generator=generator)
    target, slope = torch.tensor([3, 96, -100, 150, 40]), torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0])
    for dtype, stride, base in ((torch.float32, 103, 1), (torch.float32, 104, 0), (torch.bfloat16, 107, 3)):
        storage = torch.full((base + tokens * stride,), 7.0, dtype=dtype).to(DEVICE)
        rows = storage[base:].view(tokens, stride)[:, :columns]
        rows.copy_(values)
        exact = rows.detach().cpu().double()[:, :width]
        maximum, sum_exp = exact.amax(1), (exact - exact.amax(1, keepdim=True)).exp().sum(1)
        expected = torch.softmax(exact, dim=1) - torch.nn.functional.one_hot(target.clamp(0), 151)[:, :width]
        expected = torch.nn.functional.pad(expected * (slope * (target != -100))[:, None], (0, columns - width))
        numbers = [tensor.float().to(DEVICE) for tensor in (maximum, sum_exp, slope, torch.ones(tokens))]
        apart = torch.empty(tokens, columns, dtype=dtype, device=DEVICE)
        for written in (apart, rows):
            options = {"start": 0, "width": width, "ignore_index": -100}
            gradient.launch_gradient(rows, target.to(DEVICE), *numbers, written, **options)
        gaps = storage.clone()
        gaps[base:].view(tokens, stride)[:, :columns] = 7.0
        out[dtype, stride] = (expected, apart.cpu(), rows.cpu().clone(), bool((gaps == 7.0).all()))
    return out


def test_the_gradient_of_rows_that_begin_anywhere():
    """Odd strides, an odd base pointer, in place and apart, with whole blocks between the edges; gaps stay."""
    for (dtype, _), (expected, apart, inplace, gaps_kept) in where_kernels_run(_gradients_of_odd_rows).items():
        assert gaps_kept
        assert torch.equal(apart, inplace)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(inplace.double(), expected, rtol=tolerance, atol=1e-6)


def _loss_outcome(case: Case, impl: str, inplace: bool) -> Outcome:
    leaf = case.logits.to(DEVICE).requires_grad_()
    loss, stats = vocab_parallel_eaft_loss(
        leaf * 1, case.target.to(DEVICE), impl=impl, inplace_backward=inplace, return_stats=True, **case.kwargs
    )
    loss.backward(case.upstream().to(loss.dtype).to(DEVICE))
    parts = (loss.detach(), stats.ce, stats.entropy, stats.weight, leaf.grad)
    return Outcome(*(part.cpu() for part in parts))


def _cases(dtype, everything: bool) -> list[Case]:
    """All cases, or those few with K = 4 where they do not need another."""
    if everything or DEVICE == "cuda":
        return build_cases(dtype)
    chosen = [case for case in build_cases(dtype) if case.name in FAST_CASES[dtype]]
    return [dataclasses.replace(case, kwargs={"topk": 4, **case.kwargs}) for case in chosen]


def _all_outcomes(dtypes, everything: bool) -> dict:
    warnings.simplefilter("ignore")
    return {
        (dtype, case.name): _loss_outcome(case, "triton", inplace=number % 2 == 0)
        for dtype in dtypes
        for number, case in enumerate(_cases(dtype, everything))
    }


def _check_outcome(actual: Outcome, case: Case, where: str) -> None:
    if DEVICE == "cpu" and case.logits.dtype == torch.bfloat16:
        # The interpreter cuts float32 off to bfloat16 where the hardware rounds: one place of the gradient may differ.
        exact = reference_outcome(case).gradient
        torch.testing.assert_close(actual.gradient.double(), exact, rtol=2**-7, atol=1e-6, equal_nan=True)
        naive = reference_outcome(case, torch.float32)
        actual = dataclasses.replace(actual, gradient=naive.gradient.to(torch.bfloat16))
    assert_matches(actual, case, where)


def _outcomes(everything: bool) -> dict:
    dtypes = DTYPES[:2] if everything and DEVICE == "cpu" else DTYPES  # minutes each in the interpreter
    return where_kernels_run(_all_outcomes, dtypes, everything)


@pytest.fixture(scope="module")
def outcomes_of() -> Callable:
    """What `_outcomes` returns, computed once for each argument."""
    return once(_outcomes)


def _check_all_outcomes(outcomes_of, everything: bool) -> None:
    outcomes = outcomes_of(everything)
    for dtype in {dtype for dtype, _ in outcomes}:
        for case in _cases(dtype, everything):
            _check_outcome(outcomes[dtype, case.name], case, f"triton, {dtype}")


def test_the_loss_matches_the_float64_reference(outcomes_of):
    """Loss, cross entropy, entropy, weight and gradient through impl="triton", within twice the naive fp32 error."""
    assert len(outcomes_of(everything=False)) >= sum(map(len, FAST_CASES.values()))
    _check_all_outcomes(outcomes_of, everything=False)


@pytest.mark.slow
def test_the_loss_matches_the_float64_reference_everywhere(outcomes_of):
    """The same for every case of the loss with its own K."""
    _check_all_outcomes(outcomes_of, everything=True)


def test_the_weight_is_the_torch_paths(outcomes_of):
    """Same multiset, other exponentials: weights agree to 1e-6 relative (both are within 5e-7 of the truth)."""
    outcomes = outcomes_of(everything=False)
    for dtype in DTYPES:
        for case in _cases(dtype, everything=False):
            plain = _loss_outcome(case, "torch", inplace=False).weight
            kernel = outcomes[dtype, case.name].weight
            torch.testing.assert_close(kernel, plain, rtol=1e-6, atol=1e-12, equal_nan=True, msg=case.name)


def _merged_at(sizes, full, target, k: int, vocab: int) -> dict:
    """The merge kernel on the messages of all ranks, without a process group: what each of them would compute."""
    from eaft_megatron.loss import triton_impl

    warnings.simplefilter("ignore")
    full, target, out = full.to(DEVICE), target.to(DEVICE), {}
    for size in sizes:
        parts = []
        for rank in range(size):
            rows, plan = shard_rows(full, rank, size, vocab, k)
            parts.append(triton_impl.local_statistics(rows, target, plan))
        gathered = dataclasses.replace(parts[0], buffer=torch.stack([part.buffer for part in parts]))
        merged = triton_impl.merge_packed(gathered, target, plan)
        out[size] = {name: value.cpu() for name, value in merged._asdict().items()}
    return out


def test_the_merge_at_every_tp_size():
    """Entropy has the same bits at every TP size, all-padded ranks among them; the rest matches float64."""
    generator = torch.Generator().manual_seed(4)
    k, vocab = 6, 83  # of 128: from TP 4 on the last rank holds nothing
    full = (3 * torch.randn(5, 128, generator=generator)).to(torch.bfloat16)
    full[1] = full[1].float().round().to(torch.bfloat16)
    full[2, 5:] = -INF
    target = torch.tensor([3, 82, 4, -100, 90])
    merged = where_kernels_run(_merged_at, SIZES, full, target, k, vocab)
    wide = full[:, :vocab].double()
    p = torch.softmax(wide, dim=1)
    for size, found in merged.items():
        torch.testing.assert_close(found["entropy"], merged[1]["entropy"], rtol=0, atol=0)
        ce = torch.logsumexp(wide[:3], 1) - wide[torch.arange(3), target[:3]]
        torch.testing.assert_close(found["ce"][:3].double(), ce, rtol=1e-6, atol=1e-6)
        assert found["ce"][3] == 0 and found["entropy"][3] == 0, "an ignored token"
        assert found["ce"][4].isnan(), f"TP {size}: a target in the padding"
        torch.testing.assert_close(found["sum_p_squared"][:3].double(), p[:3].square().sum(1), rtol=2e-6, atol=0)
        assert torch.equal(found["maximum"][:3].double(), wide[:3].amax(1))


def _on_two_ranks(dtype) -> dict:
    """A sharded loss in real processes, both exchanges, and the entropy alone."""
    warnings.simplefilter("ignore")
    case = _sharded_case(dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    out = {}
    for exchange in ("packed", "split"):
        leaf = case.shard(rank, size).requires_grad_()
        loss, stats = vocab_parallel_eaft_loss(
            leaf * 1,
            case.target,
            group=dist.group.WORLD,
            impl="triton",
            exchange=exchange,
            return_stats=True,
            **case.kwargs,
        )
        loss.backward(case.upstream().to(loss.dtype))
        out[exchange] = (loss.detach(), stats.ce, stats.entropy, stats.weight, leaf.grad)
    kwargs = {"topk": case.kwargs["topk"], "vocab_size": case.kwargs["vocab_size"], "impl": "triton"}
    out["entropy"] = vocab_parallel_topk_entropy(case.shard(rank, size), group=dist.group.WORLD, **kwargs)
    return out


def _sharded_case(dtype) -> Case:
    logits = 3 * torch.randn(4, 60, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return Case("sharded", logits.to(dtype), torch.tensor([3, -100, 48, 31]), {"topk": 4, "vocab_size": 49})


def test_two_real_ranks():
    """TP 2 over gloo, interpreted: the reference's numbers, the same bits on both ranks, as in the entropy alone."""
    case = _sharded_case(torch.bfloat16)
    ranks = run_distributed(_on_two_ranks, 2, torch.bfloat16, env={"TRITON_INTERPRET": "1"}, timeout=300)
    for exchange in ("packed", "split"):
        first, second = (rank[exchange] for rank in ranks)
        assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
        gradient = torch.cat([first[4], second[4]], dim=1)
        _check_outcome(Outcome(*first[:4], gradient), case, exchange)
    valid = case.target != -100
    assert torch.equal(ranks[0]["entropy"][valid], ranks[0]["packed"][2][valid])
    assert torch.equal(ranks[0]["entropy"], ranks[1]["entropy"])


@dataclasses.dataclass(frozen=True)
class _Halting(EAFTGate):
    """Weight 0 for the second token, whatever its logits hold."""

    def weight(self, stats, context):
        return torch.where(
            torch.arange(stats.ce.shape[0], device=stats.ce.device) == 1, 0.0, super().weight(stats, context)
        )


def _zero_rows() -> tuple:
    warnings.simplefilter("ignore")
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 7] = float("nan")
    logits[2] = float("nan")
    logits[:, 33:] = float("nan")
    leaf = logits.to(DEVICE).requires_grad_()
    target = torch.tensor([0, 5, -100, 32], device=DEVICE)
    loss = vocab_parallel_token_loss(leaf, target, _Halting(), topk=3, vocab_size=33, impl="triton")
    loss.backward(torch.tensor([1.0, 1.0, float("nan"), 0.0], device=DEVICE))
    return loss.detach().cpu(), leaf.grad.cpu()


def test_rows_that_do_not_count_get_exactly_zero():
    """Ignored, weight 0, upstream gradient 0: zero though the logits or the upstream hold NaN; padding gets zero."""
    loss, gradient = where_kernels_run(_zero_rows)
    assert loss[2] == 0 and loss[1].isnan(), "NaN logits show in the loss"
    assert gradient[1:].count_nonzero() == 0
    assert gradient[0, :33].count_nonzero() == 33 and gradient[0, 33:].count_nonzero() == 0
    torch.testing.assert_close(gradient[0].sum(), torch.tensor(0.0), rtol=0, atol=1e-6)
