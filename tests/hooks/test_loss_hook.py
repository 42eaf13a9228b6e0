"""The loss hook on a real megatron-core GPTModel, in one process."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eaft_megatron import (
    ASFTGate,
    ConflictMaskGate,
    DEFTGate,
    DFTGate,
    EAFTGate,
    FLOWGate,
    IWSFTGate,
    PowerGate,
    ProFitGate,
    PSFTGate,
    SFTGate,
    SFTKLGate,
    SigmoidGate,
    STMGate,
    TALRGate,
    ThresholdGate,
    TokenStats,
    TrSFTGate,
)
from eaft_megatron.hooks import (
    LossHook,
    LossSettings,
    add_eaft_arguments,
    install,
    installed,
    settings_from_args,
    uninstall,
)
from eaft_megatron.hooks.metrics import (
    METRICS,
    WEIGHT_METRICS,
    metric_names,
    metric_sums,
    weight_sums,
    wrap_forward_step,
)
from eaft_megatron.loss.gates import Gate
from eaft_megatron.loss.reference import reference_eaft_loss
from eaft_megatron.testing import run_distributed

VOCAB = 90  # the tiny model's embedding has 96 rows: six columns of padding


def _batch() -> dict[str, torch.Tensor]:
    from eaft_megatron.testing.tiny_gpt import global_batch

    return global_batch(0, samples=2, vocab_size=VOCAB)


def _call(model, batch, **kwargs):
    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **kwargs)


def _expected(model, batch, mask: bool):
    """The reference on the model's own logits, [b, s, V] without labels."""
    with torch.no_grad():
        logits = model(batch["tokens"], batch["position_ids"], None).double()
    target = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100) if mask else batch["labels"]
    return reference_eaft_loss(logits, target, vocab_size=VOCAB)


def _in_megatron(check) -> None:
    """Run ``check(model)`` with a tiny GPTModel, CUDA stood in for."""
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, model_parallel, tiny_config

        with model_parallel():
            check(build_tiny_gpt(tiny_config())[0])


@dataclasses.dataclass(frozen=True)
class _SideSquaredGate(Gate):
    """A user's own: ``w = p ** 2 * column``, the column in training alone."""

    needs_side = ("mine",)

    def weight(self, stats, context):
        return stats.probability**2 * context.side["mine"]


def _check_own_gate(model) -> None:
    batch = _batch()
    _, ce, *_ = _expected(model, batch, mask=True)
    column = torch.linspace(0, 1, ce.numel()).view(ce.shape)
    hook = install(LossSettings(true_vocab_size=VOCAB), gate=_SideSquaredGate())
    try:
        hook.side = {"mine": column}
        actual = _call(model.train(), batch, loss_mask=batch["loss_mask"])
        expected = (-2 * ce).exp() * column * ce
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)
        assert list(metric_sums(hook.latest, batch["loss_mask"])) == list(METRICS)
        with pytest.raises(ValueError, match="side column 'mine'"):
            _call(model.train(), batch, loss_mask=batch["loss_mask"])
        evaluated = _call(model.eval(), batch, loss_mask=batch["loss_mask"])
        torch.testing.assert_close(evaluated.double(), ce, rtol=1e-5, atol=1e-6)
    finally:
        uninstall()


def test_a_gate_of_the_users_own():
    """install(gate=...): its loss and metrics, its side column, and the plain cross entropy in evaluation."""
    run_distributed(_in_megatron, 1, _check_own_gate, timeout=90)


def _check_losses(model) -> None:
    batch = _batch()
    plain = _call(model, batch).detach()
    hook = install(LossSettings("eaft", true_vocab_size=VOCAB))
    try:
        for mask in (True, False):
            loss, ce, entropy, weight = _expected(model, batch, mask)
            given = {"loss_mask": batch["loss_mask"]} if mask else {}
            actual = _call(model.train(), batch, **given)
            torch.testing.assert_close(actual.double(), loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hook.latest.stats.weight.double(), weight, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hook.latest.stats.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
            # In evaluation the same call is the plain cross entropy, and the metrics still are EAFT's.
            evaluated = _call(model.eval(), batch, **given)
            assert actual.is_contiguous() and evaluated.is_contiguous()  # hosts call view() on it
            torch.testing.assert_close(evaluated.double(), ce, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hook.latest.loss.double(), loss, rtol=1e-5, atol=1e-6)
        assert hook.calls == 4
    finally:
        uninstall()
    assert installed() is None
    torch.testing.assert_close(_call(model.train(), batch), plain, rtol=0, atol=0)


def _check_masked_labels_may_be_anything(model) -> None:
    """Where the host's mask is 0 the label is not even looked at."""
    batch = _batch()
    batch["labels"] = batch["labels"].masked_fill(batch["loss_mask"] == 0, 10**6)
    install(LossSettings("eaft", true_vocab_size=VOCAB))
    try:
        loss = _call(model, batch, loss_mask=batch["loss_mask"])
        assert loss.isfinite().all()
        assert loss[batch["loss_mask"] == 0].count_nonzero() == 0
        with pytest.raises(ValueError, match="outside the vocabulary of 90"):
            _call(model, batch)
        with pytest.raises(ValueError, match=r"loss_mask \(2, 8\) and labels \(2, \d+\) differ"):
            _call(model, batch, loss_mask=batch["loss_mask"][:, :8])
    finally:
        uninstall()


def _check_refusals(model) -> None:
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import GPTModel

    install(LossSettings())
    try:
        with pytest.raises(ValueError, match="installed already"):
            install(LossSettings())
        model.compute_language_model_loss = lambda labels, logits: logits.sum()
        with pytest.raises(ValueError, match="GPTModel overrides compute_language_model_loss"):
            _call(model, _batch())
    finally:
        uninstall()
    del model.compute_language_model_loss

    overriding = type("Overriding", (GPTModel,), {"compute_language_model_loss": lambda self, labels, logits: 0})
    with pytest.raises(ValueError, match="Overriding overrides compute_language_model_loss"):
        install(LossSettings())
    del overriding.compute_language_model_loss

    original = LanguageModule.compute_language_model_loss
    try:
        LanguageModule.compute_language_model_loss = lambda self, labels, logits, extra: 0
        with pytest.raises(ValueError, match=r"takes \(self, labels, logits, extra\)"):
            install(LossSettings())
    finally:
        LanguageModule.compute_language_model_loss = original
    assert installed() is None


def _check_other_labels_are_left_alone(model) -> None:
    """Multi-token prediction calls the method with rolled labels: Megatron's own cross entropy answers."""
    batch = _batch()
    logits = torch.randn(batch["labels"].shape[1], 2, 96)
    model.config.mtp_num_layers = 1
    hook = install(LossSettings("eaft", true_vocab_size=VOCAB))
    try:
        hook._noted = {"labels": batch["labels"], "loss_mask": None}
        rolled = model.compute_language_model_loss(batch["labels"].roll(-1, 1), logits.clone())
        assert hook.calls == 0
        model.compute_language_model_loss(batch["labels"], logits.clone())
        assert hook.calls == 1
    finally:
        uninstall()
    expected = torch.nn.functional.cross_entropy(logits.permute(1, 2, 0), batch["labels"].roll(-1, 1), reduction="none")
    torch.testing.assert_close(rolled, expected, rtol=1e-5, atol=1e-5)


def _check_metrics(model) -> None:
    from eaft_megatron.testing.tiny_gpt import masked_sum

    batch = _batch()
    mask = batch["loss_mask"]
    hook = install(LossSettings("eaft", true_vocab_size=VOCAB))
    try:

        def host(*_):
            return _call(model, batch, loss_mask=mask), functools.partial(masked_sum, mask)

        output, loss_func = wrap_forward_step(host, hook)(None, model)
        total, count, report = loss_func(output)
    finally:
        uninstall()
    loss, ce, entropy, weight = _expected(model, batch, mask=True)
    p = (-ce).exp()
    conflict = ((entropy / torch.tensor(20.0).log() < 0.17) & (p < 0.1) & (mask != 0)).double()
    assert list(report) == list(METRICS)
    for name, value in zip(METRICS, (ce, loss, weight, entropy, conflict), strict=True):
        assert report[name][1] == count == mask.sum()
        assert float(report[name][0]) == pytest.approx(float(value.sum()), rel=1e-5, abs=1e-6), name
    assert float(total) == pytest.approx(float(loss.sum()), rel=1e-5)
    with pytest.raises(RuntimeError, match="loss hook was not called"):
        hook.latest = None
        loss_func(output)


def _check_weight_metrics(model) -> None:
    """In each form in which a host reports its loss: its own, divided by what belongs to it."""
    batch = _batch()
    mask = batch["loss_mask"]
    _, ce, *_ = _expected(model, batch, mask=True)
    ordered = (-ce[mask != 0]).exp().sort().values
    middle = float(ordered[len(ordered) // 2 - 1 :][:2].mean())  # between two tokens
    hook = install(LossSettings("profit", profit_threshold=middle, true_vocab_size=VOCAB))
    forms = {
        "tensor": lambda total, count: torch.stack([total, count]),
        "pair": lambda total, count: (total, count),
        "mean": lambda total, count: total / count,
    }
    try:
        for name, form in forms.items():

            def masked(mask, output, form=form):
                total, count = (output.float() * mask).sum(), mask.sum()
                return total, count, {"lm loss": form(total.detach(), count)}

            def host(*_, masked=masked):
                return _call(model, batch, loss_mask=mask), functools.partial(masked, mask)

            output, loss_func = wrap_forward_step(host, hook)(None, model)
            report = loss_func(output)[-1]
            assert list(report) == [*METRICS, *WEIGHT_METRICS] == list(metric_names(hook))
            means = {key: float(v if name == "mean" else v[0] / v[1]) for key, v in report.items()}
            kept = float((((-ce).exp() >= middle) & (mask != 0)).sum() / mask.sum())
            assert 0.2 < kept < 0.8
            expected = {"eaft zero weight": 1 - kept, "eaft weight on conflicts": 0, "eaft weight elsewhere": kept}
            assert {key: means[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    finally:
        uninstall()


CHECKS = (
    _check_weight_metrics,
    _check_losses,
    _check_masked_labels_may_be_anything,
    _check_refusals,
    _check_other_labels_are_left_alone,
    _check_metrics,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("_check_"))
def test_hook(check):
    """Each check in a process of its own: the hook and megatron-core keep state in classes and modules."""
    pytest.importorskip("megatron.core")
    run_distributed(_in_megatron, 1, check, timeout=90)


BATCH_GATES = {
    "percentile": LossSettings("eaft", eaft_gate="threshold", percentile=30.0, true_vocab_size=VOCAB),
    "median": LossSettings("talr", true_vocab_size=VOCAB),
}


def _batch_gates() -> dict:
    """Two data-parallel ranks, each with its half of four sequences; the first also answers for the whole batch."""
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, global_batch, model_parallel, tiny_config

        with model_parallel():
            model = build_tiny_gpt(tiny_config())[0]
            whole = global_batch(0, samples=4, vocab_size=VOCAB)
            half = {name: value.chunk(2)[dist.get_rank()] for name, value in whole.items()}
            out = {"whole": _expected(model, whole, mask=True), "loss_mask": whole["loss_mask"]}
            for name, settings in BATCH_GATES.items():
                hook = install(settings)
                loss = _call(model.train(), half, loss_mask=half["loss_mask"])
                out[name] = loss.detach(), hook.latest.stats.weight
                with pytest.raises(ValueError, match="does not pass loss_mask to GPTModel"):
                    _call(model, half)
                uninstall()
    return out


def test_batch_statistics_reach_over_data_parallel_ranks():
    """The percentile and TALR's median are those of both ranks' tokens and sequences."""
    ranks = run_distributed(_batch_gates, 2)
    _, ce, entropy, _ = ranks[0]["whole"]
    valid = ranks[0]["loss_mask"] != 0
    h = entropy / math.log(20)
    weights = {"percentile": (h > torch.quantile(h[valid], 0.30)).double()}
    tau = float(np.median([float(ce[row][valid[row]].mean()) for row in range(4)]))
    weights["median"] = (-ce / tau).exp().clamp(min=0.01)
    for name, weight in weights.items():
        expected = torch.where(valid, weight, 0.0)
        loss, actual = (torch.cat(parts) for parts in zip(*(rank[name] for rank in ranks), strict=True))
        assert int((expected[valid] < 1).sum()) > 0, "the case tests nothing"
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.double(), expected * ce, rtol=1e-4, atol=1e-5)


def test_what_is_no_loss_passes_through():
    """A script with process_non_loss_data_func asks its loss function for other things at evaluation."""
    hook = LossHook(LossSettings())
    step = wrap_forward_step(
        lambda it, model: (None, functools.partial(lambda mask, output, non_loss_data: "samples", None)), hook
    )
    _, loss_func = step(None, None)
    assert loss_func(None, non_loss_data=True) == "samples"


def test_metrics_ignore_what_the_host_masks_late():
    """A NaN at a token whose loss mask is 0 does not reach a sum."""
    from eaft_megatron import vocab_parallel_eaft_loss
    from eaft_megatron.hooks.loss_hook import Observation

    logits = torch.randn(1, 3, 30)
    logits[0, 1] = float("nan")
    loss, stats = vocab_parallel_eaft_loss(logits, torch.tensor([[1, 2, 3]]), return_stats=True)
    sums = metric_sums(Observation(loss, stats), torch.tensor([[1.0, 0.0, 1.0]]))
    assert all(value.isfinite() for value in sums.values())


def test_weights_of_conflicts_and_of_the_rest():
    """By hand: tokens 0 and 1 conflict, the masked 2 would too, 3 is unsure, 4 right; TrSFT weighs p / 0.1."""
    p = torch.tensor([0.05, 0.01, 0.01, 0.05, 0.9], dtype=torch.float64)
    entropy = torch.tensor([0.1, 0.2, 0.1, 2.0, 0.1], dtype=torch.float64)
    weight = (p / 0.1).clamp(max=1)
    weight[1] = 0
    stats = TokenStats(-p.log(), entropy, weight, torch.tensor([1, 1, 0, 1, 1]) == 1, 20)
    from eaft_megatron.hooks.loss_hook import Observation

    sums = weight_sums(Observation(stats.ce, stats), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    assert [[float(total), float(count)] for total, count in sums.values()] == [[1, 4], [0.5, 2], [1.5, 2]]
    assert list(sums) == list(WEIGHT_METRICS)
    none = weight_sums(Observation(stats.ce, stats), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
    total, count = none["eaft weight on conflicts"]
    assert float(total / count) == 0 and float(count + 1) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], SFTGate()),
        (["--loss-type", "eaft", "--eaft-alpha", "2", "--eaft-entropy-norm", "3"], EAFTGate(3.0, 2.0)),
        (["--loss-type", "eaft", "--eaft-gate", "sigmoid"], SigmoidGate()),
        (["--loss-type", "eaft", "--eaft-gate", "threshold", "--eaft-threshold", ".4"], ThresholdGate(threshold=0.4)),
        (["--loss-type", "eaft", "--eaft-gate", "threshold", "--eaft-percentile", "15"], ThresholdGate(percentile=15)),
        (["--loss-type", "eaft", "--eaft-gate", "conflict-mask"], ConflictMaskGate()),
        (["--loss-type", "dft"], DFTGate()),
        (["--loss-type", "talr", "--talr-min-weight", "0.1"], TALRGate(min_weight=0.1)),
        (["--loss-type", "flow"], FLOWGate()),
        (["--loss-type", "sft-kl", "--sft-kl-beta", "0.1"], SFTKLGate(0.1)),
        (
            [
                "--loss-type",
                "eaft",
                "--eaft-gate",
                "conflict-mask",
                "--eaft-conflict-entropy",
                "0.17",
                "--eaft-conflict-probability",
                "0.1",
            ],
            ConflictMaskGate(conflict_entropy=0.17, conflict_probability=0.1),
        ),
        (["--loss-type", "power", "--power-exponent", "-0.5", "--power-max-weight", "4"], PowerGate(-0.5, 4.0)),
        (["--loss-type", "profit", "--profit-threshold", "0.2"], ProFitGate(0.2)),
        (["--loss-type", "trsft", "--trsft-threshold", "0.2"], TrSFTGate(0.2)),
        (["--loss-type", "deft"], DEFTGate()),
        (["--loss-type", "asft", "--asft-kl", "0.1"], ASFTGate(0.1)),
        (["--loss-type", "psft", "--psft-clip", "0.2"], PSFTGate(0.2)),
        (["--loss-type", "stm", "--stm-perplexity", "10"], STMGate(10.0)),
        (["--loss-type", "iw-sft", "--iw-sft-temperature", "2"], IWSFTGate(temperature=2.0)),
        (["--loss-type", "iw-sft", "--iw-sft-level", "token"], IWSFTGate("token")),
    ],
)
def test_flags_choose_the_gate(flags, expected):
    """Every method of the family behind one flag."""
    import argparse

    args = add_eaft_arguments(argparse.ArgumentParser()).parse_args(flags)
    assert settings_from_args(args).gate() == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss-type", "eaft", "--eaft-alpha", "-1"], "--eaft-alpha"),
        (["--loss-type", "eaft", "--eaft-topk", "0"], "--eaft-topk"),
        (["--loss-type", "eaft", "--eaft-entropy-norm", "0"], "--eaft-entropy-norm"),
        (["--true-vocab-size", "0"], "--true-vocab-size"),
        (["--loss-type", "sft", "--eaft-alpha", "2"], "--eaft-alpha is for --loss-type eaft, not sft"),
        (["--loss-type", "eaft", "--talr-tau", "2"], "--talr-tau is for --loss-type talr, not eaft"),
        (["--loss-type", "eaft", "--eaft-percentile", "15"], "--eaft-percentile is for --eaft-gate threshold or"),
        (["--loss-type", "eaft", "--eaft-gate", "threshold"], "one of threshold"),
        (["--loss-type", "eaft", "--eaft-gate", "sigmoid", "--eaft-alpha", "2"], "--eaft-alpha is for --eaft-gate"),
        (["--loss-type", "talr", "--talr-tau", "-1"], "--talr-tau"),
        (["--loss-type", "eaft", "--eaft-linear-chunk", "0"], "--eaft-linear-chunk must be >= 1"),
        (["--loss-type", "eaft", "--eaft-linear-drop-ignored"], "is for --eaft-linear-chunk N, which is missing"),
    ],
)
def test_a_bad_flag_is_named(flags, message):
    """The ValueError says which flag is wrong."""
    import argparse

    args = add_eaft_arguments(argparse.ArgumentParser()).parse_args(flags)
    with pytest.raises(ValueError, match=message):
        settings_from_args(args)
