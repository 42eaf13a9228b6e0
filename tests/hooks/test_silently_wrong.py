"""What Megatron-LM accepts and would train wrongly: refused, or right. Against its own modules and training loop."""

from __future__ import annotations

import argparse
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from eaft_megatron import megatron_map
from eaft_megatron.hooks import LossSettings, install, uninstall
from eaft_megatron.hooks.hybrid_checks import check_hybrid
from eaft_megatron.hooks.masked_packs import refuse_attention_without_mask
from eaft_megatron.hooks.metrics import METRICS, _in_form_of
from eaft_megatron.hooks.refusals import uneven_averages
from eaft_megatron.hooks.side_columns import _bounds
from eaft_megatron.testing import run_distributed

pytest.importorskip("megatron.core")


def gathered_logits(how: str) -> str:
    """What a GPTModel at tensor parallel 2 says that is built or called so that its logits are gathered."""
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from eaft_megatron.testing.tiny_gpt import global_batch, model_parallel, tiny_config

        with model_parallel(tp=2):
            install(LossSettings("eaft"))
            options = dict(vocab_size=96, max_sequence_length=24, position_embedding_type="rope")
            options |= dict(parallel_output=how != "parallel_output")
            model = GPTModel(tiny_config(num_layers=1), get_gpt_layer_local_spec(normalization="RMSNorm"), **options)
            batch = global_batch(0)
            call = dict(labels=batch["labels"], loss_mask=batch["loss_mask"])
            if how == "runtime_gather_output":
                call["runtime_gather_output"] = True
            try:
                model(batch["tokens"], batch["position_ids"], None, **call)
            except ValueError as error:
                return str(error)
            finally:
                uninstall()
            return "computed"


@pytest.mark.parametrize("how", ["parallel_output", "runtime_gather_output", "sharded"])
def test_gathered_logits_are_refused(how):
    """Their losses would be right and rank 1's gradient of the output layer 0; sharded ones are computed."""
    for said in run_distributed(gathered_logits, 2, how):
        assert said == "computed" if how == "sharded" else f"{how}" in said and "sharded" in said


def fused_output_layer() -> str:
    """What a model says whose configuration asks for a loss within the output layer (Megatron's dev branch)."""
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import build_tiny_gpt, global_batch, model_parallel, tiny_config

        with model_parallel():
            install(LossSettings("eaft"))
            config = tiny_config(num_layers=1)
            model = build_tiny_gpt(config)[0]
            config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl = True, "linear"
            batch = global_batch(0)
            try:
                model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            except ValueError as error:
                return str(error)
            finally:
                uninstall()
            return "computed"


def test_a_loss_within_the_output_layer_is_refused_under_a_bare_install():
    """No flag was parsed: the model's own configuration tells."""
    assert "cross_entropy_fusion_impl 'linear'" in run_distributed(fused_output_layer, 1)[0]


def report_of_no_token() -> list[float]:
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import model_parallel

        with model_parallel():
            sums = {name: (torch.zeros(()), None) for name in METRICS}
            return [float(value) for value in _in_form_of(torch.tensor(0.0), sums, torch.zeros(2, 4)).values()]


def test_a_micro_batch_without_a_token_reports_zeros():
    """Scalar reports: means over no token are 0, as the host's guarded loss is, and not NaN."""
    assert run_distributed(report_of_no_token, 1) == [[0.0] * len(METRICS)]


def test_context_parallel_averages():
    """Without --calculate-per-token-loss the gradient changes with the context-parallel size."""
    flags = dict(context_parallel_size=2, calculate_per_token_loss=False)
    assert "--calculate-per-token-loss" in uneven_averages(argparse.Namespace(**flags))
    assert uneven_averages(argparse.Namespace(**flags | {"calculate_per_token_loss": True})) is None
    assert uneven_averages(argparse.Namespace(**flags | {"context_parallel_size": 1})) is None


def test_boundaries_of_several_packs():
    """One behind the other, the padding of each pack's boundaries left out."""
    bounds = torch.tensor([[0, 4, 16, 16], [0, 8, 12, 16]], dtype=torch.int32)
    assert _bounds(bounds, 16) == [0, 4, 16, 24, 28, 32]
    assert _bounds(bounds[:1], 16) == _bounds(bounds[0], 16) == [0, 4, 16]
    assert _bounds(None, 16) is None


def hybrid_flags(**flags) -> argparse.Namespace:
    given = dict(hybrid_layer_pattern="*-*-", position_embedding_type="rope", spec=["mine", "stack"])
    return argparse.Namespace(**given | flags)


@pytest.mark.parametrize("flag", ["rotary_interleaved", "use_rope_scaling"])
def test_hybrid_models_pass_over_rotary_options(flag, monkeypatch, tmp_path):
    """Refused as long as the release does so, and where our spec does not make up for it; never for a GPTModel."""
    with pytest.raises(ValueError, match="--" + flag.replace("_", "-") + ": HybridModel"):
        check_hybrid(hybrid_flags(**{flag: True}))
    check_hybrid(hybrid_flags(**{flag: False}))
    check_hybrid(hybrid_flags(**{flag: True}, hybrid_layer_pattern=None))
    check_hybrid(hybrid_flags(**{flag: True}, position_embedding_type="none"))
    (tmp_path / f"mends_{flag}.py").write_text(f"MENDS = ('{flag}',)\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_hybrid(hybrid_flags(**{flag: True}, spec=[f"mends_{flag}", "stack"]))
    mended = "RotaryEmbedding(rotary_interleaved=..., rope_scaling=...)"
    monkeypatch.setattr(megatron_map, "hybrid_rotary_source", lambda: mended)
    check_hybrid(hybrid_flags(**{flag: True}))


def test_hybrid_layers_without_transformer_engine(monkeypatch):
    """What is missing is named, instead of a StopIteration within Megatron."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match="Transformer Engine alone"):
        check_hybrid(hybrid_flags(spec=["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]))
    check_hybrid(hybrid_flags())  # layers of one's own may need none


def test_attention_that_ignores_the_mask_is_seen_in_the_model():
    """Whatever --transformer-impl says, the modules decide."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    local = torch.nn.Module()
    local.core_attention = DotProductAttention.__new__(DotProductAttention)
    torch.nn.Module.__init__(local.core_attention)
    refuse_attention_without_mask([local])
    other = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Module()])})
    other["layers"][0].core_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="attention is Identity, which ignores the mask"):
        refuse_attention_without_mask([local, other])


def test_batch_statistics_run_over_every_rank_with_other_data():
    """Where weights are spread over a further axis, the group that its ranks belong to as well."""
    from eaft_megatron.hooks.loss_hook import _data_parallel_group

    model = SimpleNamespace(pg_collection=SimpleNamespace(dp_cp="inner", dp_cp_gtp_remat="all"))
    assert _data_parallel_group(model) == "all"
    assert _data_parallel_group(SimpleNamespace(pg_collection=SimpleNamespace(dp_cp="all"))) == "all"
