"""The adapters, driven by stand-ins with the signatures and layouts of the stacks they were written against."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

from eaft_megatron.hooks import LossSettings, installed, uninstall
from eaft_megatron.hooks.metrics import METRICS
from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.testing import run_distributed
from tests.examples.slime_batch import COLUMNS, VOCAB, pieces, reduction, reference, sample_logits, samples, total_of
from tests.worlds import once

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"


def _adapter(name: str) -> ModuleType:
    """By path: the folder must not be on sys.path, where slime.py would hide slime."""
    spec = importlib.util.spec_from_file_location(f"adapter_{name}", ADAPTERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Megatron-Bridge v0.6.0


def _masked_next_token_loss(loss_mask, output_tensor, check_for_nan_in_loss=True, check_for_spiky_loss=False):
    """Bridge's loss function: sum, count, and both in one tensor as the report."""
    mask = loss_mask.view(-1).float()
    total, count = (output_tensor.view(-1).float() * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.cat([total.detach().view(1), count.view(1)])}


def _bridge_forward_step(state, data_iterator, model, return_schedule_plan=False):
    """Bridge's gpt_step: the model gets labels and no loss mask, the loss function the mask first."""
    state.steps += 1
    batch = next(data_iterator)
    output = model(
        input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )
    return output, functools.partial(
        _masked_next_token_loss, batch["loss_mask"], check_for_nan_in_loss=True, check_for_spiky_loss=False
    )


def _config(**model) -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(**model), tokenizer=SimpleNamespace())


def _with_state(forward_step, state):
    """As Bridge does before training: pass its state to a step whose first parameter has that name."""
    assert next(iter(inspect.signature(forward_step).parameters)) == "state"
    return functools.partial(forward_step, state)


@contextlib.contextmanager
def _tiny_model(tp: int):
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, model_parallel, tiny_config

        with model_parallel(tp=tp):
            yield build_tiny_gpt(tiny_config())[0]


def _tensor_parallel() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def _gathered(shard: torch.Tensor) -> torch.Tensor:
    """The whole vocabulary, float64, from this rank's columns."""
    group = _tensor_parallel()
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim=-1).double()


def _bridge_reference(model, batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Sums of the metrics, and every parameter's gradient of the summed EAFT loss, from the model's own logits."""
    logits = model(batch["tokens"], batch["position_ids"], None)
    full = _gathered(logits.detach()).requires_grad_()
    target = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    loss, ce, entropy, weight = reference_eaft_loss(full, target, vocab_size=VOCAB)
    loss.sum().backward()
    logits.backward(full.grad.chunk(_tensor_parallel().size(), dim=-1)[_tensor_parallel().rank()].float())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    conflict = (entropy / math.log(20) < 0.17) & ((-ce).exp() < 0.1) & (target != -100)
    return dict(zip(METRICS, map(total_of, (ce, loss, weight, entropy, conflict)), strict=True)), gradients


def _check_bridge() -> None:
    for tp in (1, 2):
        _check_bridge_at(tp)


def _check_bridge_at(tp: int) -> None:
    with _tiny_model(tp) as model:
        from eaft_megatron.testing.tiny_gpt import global_batch

        batch = global_batch(0, samples=2, vocab_size=VOCAB)
        expected, gradients = _bridge_reference(model, batch)
        state = SimpleNamespace(steps=0)
        make = _adapter("megatron_bridge").eaft_forward_step
        forward_step = _with_state(make(_config(vocab_size=VOCAB), LossSettings("eaft"), _bridge_forward_step), state)
        try:
            output, loss_func = forward_step(iter([batch]), model)
            total, count, report = loss_func(output)
            total.backward()
            evaluated, _, evaluation = _evaluate(forward_step, model, batch)
        finally:
            uninstall()
        assert state.steps == 2 and count == batch["loss_mask"].sum()
        assert float(total) == pytest.approx(expected["eaft loss"], rel=1e-5)
        assert list(report) == list(evaluation) == list(METRICS)
        for name, value in expected.items():
            assert report[name].shape == (2,) and report[name][1] == count
            assert float(report[name][0]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
        assert float(evaluated) == pytest.approx(expected["lm loss"], rel=1e-5)  # in evaluation nothing is weighted


def _evaluate(forward_step, model, batch):
    with torch.no_grad():
        output, loss_func = forward_step(iter([batch]), model.eval())
        return loss_func(output)


def test_bridge_trains_and_reports_eaft():
    """Loss, report and gradients of a real GPTModel at TP 1 and 2, through a step and a report of Bridge's form."""
    pytest.importorskip("megatron.core")
    run_distributed(_check_bridge, 2, timeout=240)


def test_bridge_errors_name_the_way_out():
    """An unknown vocabulary and an unknown signature are found before anything is installed."""
    make = _adapter("megatron_bridge").eaft_forward_step
    with pytest.raises(ValueError, match="true_vocab_size=N"):
        make(_config(vocab_size=None), LossSettings("eaft"), _bridge_forward_step)
    forced = _config(vocab_size=VOCAB)
    forced.tokenizer.use_tokenizer_vocab_size = True
    with pytest.raises(ValueError, match="true_vocab_size=N"):
        make(forced, LossSettings("eaft"), _bridge_forward_step)
    with pytest.raises(ValueError, match=r"forward_step_func takes \(model, data\)"):
        make(_config(vocab_size=VOCAB), LossSettings("eaft"), lambda model, data: None)
    assert installed() is None


# slime v0.3.1


class _Layout(NamedTuple):
    tp: int
    cp: int
    per_token: bool
    temperature: float = 1.0
    recompute: bool = False


LAYOUTS = [
    _Layout(1, 1, per_token=True),
    _Layout(2, 1, per_token=True),
    _Layout(2, 1, per_token=False, temperature=0.7, recompute=True),
    _Layout(1, 2, per_token=False),
    _Layout(1, 2, per_token=True, temperature=0.7),
]


def _slime_answer(layout: _Layout) -> tuple[dict[str, float], torch.Tensor]:
    """This rank's log, and the gradient of its logits ``[T, COLUMNS / tp]``."""
    from megatron.core import mpu

    mpu.initialize_model_parallel(tensor_model_parallel_size=layout.tp, context_parallel_size=layout.cp)
    cp_rank = mpu.get_context_parallel_rank()
    packed = torch.cat([pieces(logits, cp_rank, layout.cp) for logits in sample_logits()])
    packed = torch.cat([packed, torch.full((-len(packed) % 16, COLUMNS), float("nan"))])  # slime's padding at the end
    leaf = packed.chunk(layout.tp, dim=1)[mpu.get_tensor_model_parallel_rank()].clone().requires_grad_()
    batch = samples()
    args = Namespace(rollout_temperature=layout.temperature, vocab_size=VOCAB, allgather_cp=False, eaft_topk=20)
    reduce = reduction(batch, cp_rank, layout.cp, layout.per_token)
    eaft_loss = _adapter("slime").eaft_loss
    if layout.recompute:
        eaft_loss = functools.partial(torch.utils.checkpoint.checkpoint, eaft_loss, use_reentrant=False)
    loss, log = eaft_loss(args, batch, (leaf * 1).unsqueeze(0), reduce)
    loss.backward()
    if layout.cp > 1:
        with pytest.raises(ValueError, match="--allgather-cp"):
            eaft_loss(Namespace(**{**vars(args), "allgather_cp": True}), batch, leaf.unsqueeze(0), reduce)
    mpu.destroy_model_parallel()
    values = torch.tensor([0, *log.values()])  # as slime packs its log
    return dict(zip(log, values[1:].tolist(), strict=True)), leaf.grad


def _slime_answers() -> list[tuple[dict[str, float], torch.Tensor]]:
    return [_slime_answer(layout) for layout in LAYOUTS]


def _slime_run() -> list[list]:
    return run_distributed(_slime_answers, 2, timeout=240)


@pytest.fixture(scope="module")
def slime_run() -> Callable:
    """What `_slime_run` returns, computed once for each argument."""
    return once(_slime_run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_slime_agrees_with_the_reference(slime_run, layout):
    """Logged numbers and gradients of packed samples, cut over tensor- or context-parallel ranks."""
    pytest.importorskip("megatron.core")
    expected, gradients = reference(layout.per_token, layout.temperature)
    ranks = [answers[LAYOUTS.index(layout)] for answers in slime_run()]
    for name, value in expected.items():
        actual = sum(log[name] for log, _ in ranks[: layout.cp])  # without context parallelism every rank has it all
        assert actual == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for rank, (log, gradient) in enumerate(ranks):
        assert list(log) == ["loss", "lm loss", "eaft weight", "eaft entropy", "eaft conflict rate"]
        assert layout.cp == 2 or log == ranks[0][0]
        held = torch.cat([pieces(full, rank, layout.cp) for full in gradients])
        wanted = torch.cat([held, held.new_zeros(len(gradient) - len(held), COLUMNS)])
        wanted = wanted.chunk(layout.tp, dim=1)[rank % layout.tp]
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


def test_slime_spans_of_a_known_case():
    """Two samples at CP 2 by hand: five tokens in chunks of two, and a response that rank 0 holds no part of."""
    spans = _adapter("slime").response_spans
    assert [(s.sample, s.start, s.token, s.length) for s in spans([5], [3], 0, 1)] == [(0, 1, 2, 3)]
    assert [(s.start, s.token, s.length) for s in spans([5, 4], [3, 1], 0, 2) if s.length] == [(1, 2, 1)]
    assert [(s.start, s.token, s.length) for s in spans([5, 4], [3, 1], 1, 2) if s.length] == [(0, 3, 2), (5, 3, 1)]
    assert len(spans([5, 4], [3, 1], 0, 2)) == 4  # the empty pieces are counted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eaft_gate": "threshold", "eaft_percentile": 15.0}, "give eaft_threshold or talr_tau"),
        ({"eaft_gate": "conflict-mask"}, "give eaft_threshold or talr_tau"),
        ({"eaft_loss_type": "talr"}, "give eaft_threshold or talr_tau"),
        ({"eaft_loss_type": "sft-kl"}, "needs ref_logprob"),
        ({"eaft_alhpa": 2.0}, "unknown option.*eaft_alhpa"),
        ({"eaft_topk": 0}, "--eaft-topk must be >= 1"),
    ],
)
def test_slime_options_that_cannot_work_are_refused(options, message):
    """The ValueError says what is wrong before anything is computed."""
    with pytest.raises(ValueError, match=message):
        _adapter("slime").eaft_loss(Namespace(**options), samples(), torch.zeros(1, 3, COLUMNS), torch.sum)


def test_slime_logits_must_be_packed():
    """A batch of rows is another layout of slime's, not this one."""
    with pytest.raises(ValueError, match=r"packed, \[1, T, V/tp\], got \(2, 3, 96\)"):
        _adapter("slime").eaft_loss(Namespace(), samples(), torch.zeros(2, 3, COLUMNS), torch.sum)
