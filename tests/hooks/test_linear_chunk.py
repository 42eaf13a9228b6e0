"""--eaft-linear-chunk on real megatron-core: the losses and gradients of whole logits, which are never made."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch

from eaft_megatron.hooks import LossSettings, install, loss_hook, uninstall, wrap_forward_step
from eaft_megatron.hooks.deferred_logits import DeferredLogits, deferring
from eaft_megatron.testing import run_distributed
from tests.worlds import once

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

VOCAB = 90  # of 96 rows
CHUNK = 7  # divides neither a micro-batch's 48 tokens nor those of them that count
WHOLE = LossSettings("eaft", true_vocab_size=VOCAB)
MEDIAN = LossSettings("talr", true_vocab_size=VOCAB)
LAYOUTS = {  # processes -> name -> how it is built
    1: {"one process": {}, "tied": dict(tied=True), "median": dict(settings=MEDIAN)},
    2: {
        "tp2": dict(tp=2),
        "tp2 tied": dict(tp=2, tied=True),
        "tp2 sequence parallel": dict(tp=2, sequence_parallel=True),
        "pp2 tied": dict(pp=2, tied=True),
        "pp2 interleaved": dict(pp=2, vpp=2),
        "dp2 distributed optimizer": dict(distributed=True),
        "dp2 median": dict(settings=MEDIAN),
    },
    4: {"tp2 pp2 tied": dict(tp=2, pp=2, tied=True), "tp2 dp2 distributed optimizer": dict(tp=2, distributed=True)},
}


def _step(tp=1, pp=1, vpp=None, tied=False, distributed=False, settings=WHOLE, chunk=None, **config) -> dict:
    """Loss, gradient norm and every gradient of one step, and the evaluation loss of the first micro-batch."""
    from eaft_megatron.testing import tiny_gpt

    hook = install(dataclasses.replace(settings, linear_chunk=chunk))
    try:
        with tiny_gpt.model_parallel(tp, pp, vpp):
            chunks = tiny_gpt.build_tiny_gpt(tiny_gpt.tiny_config(**config), share_embeddings=tied)
            model, optimizer = tiny_gpt.with_optimizer(chunks, distributed=distributed)

            def forward_step(data_iterator, model):
                batch = next(data_iterator)
                mask = batch["loss_mask"]
                output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask)
                return output, functools.partial(tiny_gpt.masked_sum, mask)

            batch = tiny_gpt.global_batch(0, samples=4, vocab_size=VOCAB)
            step = wrap_forward_step(forward_step, hook)
            loss, norm = tiny_gpt.train_step(model, optimizer, batch, forward_step=step, micro_batch_size=2)
            gradients = {
                f"{stage}.{name}": parameter.main_grad.clone()
                for stage, part in enumerate(model)
                for name, parameter in part.module.named_parameters()
            }
            evaluation = _evaluation(chunks, batch, pp)
            return {"loss": loss, "norm": norm, "gradients": gradients, "evaluation": evaluation, "seen": hook.calls}
    finally:
        uninstall()


@torch.no_grad()
def _evaluation(chunks, batch, pp):
    if pp > 1:
        return torch.zeros(())
    return chunks[0].eval()(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"]
    )


def _both(processes: int) -> dict[str, tuple[dict, dict]]:
    from eaft_megatron.testing.cpu import cpu_standins

    def never(self):
        raise AssertionError("the logits were made whole")

    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["chunk_tokens"])
        return linear(*args, **kwargs)

    found, materialize, linear = {}, DeferredLogits.materialize, loss_hook.vocab_parallel_linear_token_loss
    loss_hook.vocab_parallel_linear_token_loss = counted
    with cpu_standins():
        for name, layout in LAYOUTS[processes].items():
            expected = _step(**layout)
            assert not calls
            DeferredLogits.materialize = never
            found[name] = _step(**layout, chunk=CHUNK), expected
            DeferredLogits.materialize = materialize
            found[name][0]["calls"] = list(calls)
            calls.clear()
    return found


def _results(processes: int) -> list[dict[str, tuple[dict, dict]]]:
    return run_distributed(_both, processes, processes, timeout=200)


@pytest.fixture(scope="module")
def results() -> Callable:
    """What `_results` returns, computed once for each argument."""
    return once(_results)


def _assert_same(results, name: str, processes: int) -> None:
    assert any(rank[name][0]["calls"] for rank in results(processes))
    for rank in results(processes):
        actual, expected = rank[name]
        # The last stage, in training and (without PP) in evaluation.
        assert set(actual["calls"]) <= {CHUNK} and bool(actual["calls"]) == bool(expected["seen"])
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert actual["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        torch.testing.assert_close(actual["evaluation"], expected["evaluation"], rtol=1e-5, atol=1e-6)
        assert actual["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                actual["gradients"][parameter], gradient, rtol=1e-4, atol=1e-5 * scale, msg=f"{parameter} differs"
            )


@pytest.mark.parametrize("name, processes", [(name, processes) for processes in (1, 2) for name in LAYOUTS[processes]])
def test_as_with_whole_logits(results, name, processes):
    _assert_same(results, name, processes)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS[4])
def test_as_with_whole_logits_on_four(results, name):
    _assert_same(results, name, 4)


def _in_megatron(check) -> None:
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, global_batch, model_parallel, tiny_config

        with model_parallel():
            model = build_tiny_gpt(tiny_config())[0].train()
            batch = global_batch(0, samples=2, vocab_size=VOCAB)
            hook = install(dataclasses.replace(WHOLE, linear_chunk=CHUNK))
            try:
                check(model, batch, hook)
            finally:
                uninstall()


def _call(model, batch, **kwargs):
    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **kwargs)


def _check_scaled_logits(model, batch, hook) -> None:
    """MuP multiplies what the output layer gives by a number: as if its weight were so much smaller."""
    scale, weight = 0.25, model.output_layer.weight
    own = hook.compute
    hook.compute = lambda self, labels, logits, original: own(self, labels, scale * logits, original)
    loss = _call(model, batch)
    loss.sum().backward()
    scaled = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    uninstall()
    install(WHOLE)
    with torch.no_grad():
        weight.mul_(scale)
    model.zero_grad()
    expected = _call(model, batch)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        grad = parameter.grad * scale if parameter is weight else parameter.grad
        torch.testing.assert_close(scaled[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def _check_other_uses_get_the_logits(model, batch, hook) -> None:
    """Another head's loss is Megatron's own; whatever else looks at the logits sees them; gradients reach both."""
    seen = {}
    own = hook.compute

    def looking(self, labels, logits, original):
        self.config.mtp_num_layers = 1
        rolled = labels.roll(-1, 1)
        with torch.no_grad():  # a metric that comes first must not take the gradient away
            seen["tensor"], seen["shape"], seen["sum"] = logits.argmax(-1), logits.shape, torch.sum(logits)
        with pytest.raises(ValueError, match=r"changes the logits in place \(mul_\)"):
            logits.mul_(2)
        assert isinstance(logits / 2, DeferredLogits) and torch.equal(logits[0] - 1, (logits - 1)[0])
        seen["head"] = own(self, rolled, logits, original)  # which overwrites them, as it does without us
        self.config.mtp_num_layers = None
        return own(self, labels, logits, original)

    hook.compute = looking
    loss = _call(model, batch)
    with torch.no_grad():
        logits = model(batch["tokens"], batch["position_ids"], None)  # [b, s, V], without labels: never deferred
    expected = torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), batch["labels"].roll(-1, 1), reduction="none")
    torch.testing.assert_close(seen["head"].detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen["tensor"], logits.argmax(-1).T) and seen["shape"] == logits.transpose(0, 1).shape
    torch.testing.assert_close(seen["sum"].detach(), logits.sum(), rtol=1e-4, atol=1e-4)
    (loss.sum() + seen["head"].sum()).backward()
    assert model.output_layer.weight.grad.isfinite().all() and seen["head"].requires_grad
    assert "forward" not in vars(model.output_layer), "the output layer is not as it was"


def _check_frozen_output_layer(model, batch, hook) -> None:
    """A weight that is not trained gets no gradient; the hidden states get theirs."""
    model.output_layer.weight.requires_grad_(False)
    _call(model, batch).sum().backward()
    assert model.output_layer.weight.grad is None
    assert float(model.decoder.final_layernorm.weight.grad.abs().sum()) > 0


def _check_refusals(model, batch, hook) -> None:
    layer = model.output_layer

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"--eaft-linear-chunk.*{message}"), deferring(model):
            pass

    for owner, name, value, message in (
        (layer, "bias", torch.nn.Parameter(torch.zeros(96)), "cannot serve .* with a bias"),
        (layer, "gather_output", True, "cannot serve .* gathers its logits"),
        (layer, "disable_grad_reduce", True, "cannot serve .* disable_grad_reduce"),
        (model.config, "defer_embedding_wgrad_compute", True, "cannot serve --defer-embedding-wgrad-compute"),
        (model.config, "config_logger_dir", "logs", "cannot serve --config-logger-dir"),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        refused(message)
        setattr(owner, name, before)
    kind = type(layer)
    layer.__class__ = type("LoRAOutput", (kind,), {"forward": lambda self, *args, **kwargs: None})
    refused("LoRAOutput, computes in its own way")
    layer.__class__ = kind
    layer.forward = layer.forward
    refused("computes in its own way")
    del layer.forward
    layer.weight.is_torch_fsdp2_param = True
    refused("as a plain tensor")
    del layer.weight.is_torch_fsdp2_param
    layer.output_dtype = torch.float64
    refused("cannot serve --output-logit-dtype")
    del layer.output_dtype
    layer.weight.__fsdp_param__ = True
    with pytest.raises(ValueError, match="as a plain tensor"):
        _call(model, batch)
    del layer.weight.__fsdp_param__
    own = hook.compute
    hook.compute = lambda self, labels, logits, original: own(self, labels, logits.materialize(), original)
    with pytest.raises(ValueError, match="its logits are whole already"):
        _call(model, batch)
    hook.compute = own
    assert _call(model, batch).isfinite().all()


CHECKS = (_check_scaled_logits, _check_other_uses_get_the_logits, _check_frozen_output_layer, _check_refusals)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("_check_"))
def test_deferred_logits(check):
    run_distributed(_in_megatron, 1, check, timeout=90)
