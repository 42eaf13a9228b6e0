"""megatron-core with the stand-in in Transformer Engine's place: found, used, gone; against its local layers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from eaft_megatron.run import main
from eaft_megatron.testing import run_distributed
from eaft_megatron.testing.te_standin import transformer_engine_standin

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the stand-ins are refused where CUDA is available", allow_module_level=True)


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="a real Transformer Engine is here"
)
def test_it_is_never_importable_by_accident():
    """Only within the block, by every way to look for it; a submodule it does not have is a missing module."""
    _run(
        "import importlib.util, importlib.metadata, sys\n"
        "from eaft_megatron.testing.te_standin import transformer_engine_standin\n"
        "assert importlib.util.find_spec('transformer_engine') is None\n"
        "with transformer_engine_standin():\n"
        "    import transformer_engine, transformer_engine_torch\n"
        "    assert transformer_engine.pytorch.module.base and importlib.util.find_spec('transformer_engine')\n"
        "    assert importlib.metadata.version('transformer-engine') == transformer_engine.__version__\n"
        "    assert importlib.util.find_spec('transformer_engine.pytorch.optimizers') is None\n"
        "assert importlib.util.find_spec('transformer_engine') is None\n"
        "assert not [name for name in sys.modules if name.startswith('transformer_engine')]\n"
    )


def test_too_late_is_said():
    """megatron-core has looked for Transformer Engine already."""
    _run(
        "import megatron.core\n"
        "from eaft_megatron.testing.te_standin import transformer_engine_standin\n"
        "try:\n"
        "    transformer_engine_standin().__enter__()\n"
        "except RuntimeError as error:\n"
        "    assert 'comes too late' in str(error)\n"
        "else:\n"
        "    raise SystemExit('not refused')\n"
    )


def test_refused_where_cuda_is_available(monkeypatch):
    """Nothing may stand in for the real one where that can run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="without CUDA"), transformer_engine_standin():
        pass


def _local_names(state: dict) -> dict:
    """TE's fused names for a norm and the layer behind it, as the local spec has them."""
    renamed = {}
    for name, value in state.items():
        for fused, norm in (("linear_qkv", "input_layernorm"), ("linear_fc1", "pre_mlp_layernorm")):
            layer = name.partition(f"{'self_attention' if fused == 'linear_qkv' else 'mlp'}.{fused}.layer_norm_")
            if layer[1]:
                name = f"{layer[0]}{norm}.{layer[2]}"
        if not name.endswith("_extra_state"):
            renamed[name] = value
    return renamed


def te_against_local() -> dict:
    """Losses and gradient norms of one small GPTModel in both specs, and what the TE one adds to checkpoints."""
    with transformer_engine_standin():
        from eaft_megatron.testing.cpu import cpu_standins

        with cpu_standins():
            from megatron.core.models.gpt.gpt_layer_specs import (
                get_gpt_layer_local_spec,
                get_gpt_layer_with_transformer_engine_spec,
            )
            from megatron.core.models.gpt.gpt_model import GPTModel

            from eaft_megatron.testing.tiny_gpt import model_parallel, tiny_config

            with model_parallel():
                config = tiny_config(normalization="RMSNorm", num_query_groups=2)
                tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
                positions, labels = torch.arange(16).expand(2, 16), tokens.roll(-1, 1)
                models, seen = [], []
                for spec in (
                    get_gpt_layer_local_spec(normalization="RMSNorm"),
                    get_gpt_layer_with_transformer_engine_spec(),
                ):
                    options = dict(vocab_size=96, max_sequence_length=16, position_embedding_type="rope")
                    models.append(GPTModel(config, spec, **options))
                local, engine = models
                names = {name: key for key in engine.state_dict() for name in _local_names({key: 0})}
                engine.load_state_dict({names[k]: v for k, v in local.state_dict().items() if k in names}, strict=False)
                for model in models:
                    loss = model(tokens, positions, None, labels=labels).mean()
                    loss.backward()
                    gradients = _local_names({name: p.grad for name, p in model.named_parameters()})
                    seen.append((float(loss.detach()), {name: float(grad.norm()) for name, grad in gradients.items()}))
                keys = [key for key in engine.sharded_state_dict() if key.endswith("_extra_state")]
                return {"local": seen[0], "engine": seen[1], "extra": keys}


def test_megatrons_te_layers_are_its_local_ones():
    """One model in both specs, the same weights: loss and the gradient of every parameter; TE's checkpoint keys."""
    seen = run_distributed(te_against_local, 1, fresh=True)[0]
    (expected_loss, expected), (actual_loss, actual) = seen["local"], seen["engine"]
    assert actual_loss == pytest.approx(expected_loss, rel=1e-6)
    assert actual.keys() == expected.keys() and len(actual) > 10
    assert actual == pytest.approx(expected, rel=1e-5)
    for layer in ("self_attention.linear_qkv", "mlp.linear_fc2", "final_layernorm"):
        assert any(layer in key for key in seen["extra"]), seen["extra"]


def test_the_switch_of_run_is_for_the_cpu(capsys):
    """A training run on GPUs never gets the stand-in."""
    assert main(["--transformer-engine", "standin", "pretrain_gpt.py"]) == 1
    assert "--transformer-engine standin is for --device cpu" in capsys.readouterr().err
