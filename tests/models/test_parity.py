"""megatron-core against transformers, in real processes: the same logits, the same gradients, the same files back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from eaft_megatron.megatron_map import kv_groups_can_be_shared
from eaft_megatron.testing.distributed import run_distributed
from tests.models import ranks
from tests.models.tiny import (
    FAMILIES,
    LENGTH,
    VARIANTS,
    VOCAB,
    save,
    tiny_family,
    tiny_llama,
    token_ids,
    transformers_answer,
)

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
LOGIT_TOLERANCE = 1e-4  # absolute; float32 logits of size about 6
GRADIENT_TOLERANCE = 1e-4  # relative to the largest element of the tensor, and to the loss
MODELS = [*VARIANTS, *FAMILIES]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (transformers model, its folder)."""
    root = tmp_path_factory.mktemp("hf")
    made = {name: tiny_llama(name) for name in VARIANTS} | {name: tiny_family(name) for name in FAMILIES}
    return {name: (model, save(model, root / name)) for name, model in made.items()}


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """run((tp, pp)) -> (answers of all ranks, folder with the exports): one set of processes per layout."""
    done = {}

    def once(sizes):
        if sizes not in done:
            tp, pp = sizes
            folders = {name: folder for name, (_, folder) in models.items() if can_run(name, tp)}
            output = tmp_path_factory.mktemp("exports")
            answers = run_distributed(ranks.all_answers, tp * pp, folders, tp, pp, token_ids(), output, timeout=100)
            done[sizes] = answers, output
        return done[sizes]

    return once


def can_run(name: str, tp: int) -> bool:
    return tp == 1 or "one_group" not in name or kv_groups_can_be_shared()


def skip_unless_possible(name: str, tp: int) -> None:
    if not can_run(name, tp):
        pytest.skip("before megatron-core 0.16 tensor-parallel ranks cannot share a KV group")


def layouts(*which: tuple[int, int]):
    return pytest.mark.parametrize("sizes", which, ids="tp{0[0]}-pp{0[1]}".format)


def check_answer(answers, key: str, model, ids: torch.Tensor, tp: int) -> None:
    expected_logits, expected_gradients, expected_loss = transformers_answer(model, ids)
    seen = [answer[key][0] for answer in answers if answer[key][0] is not None]
    assert len(seen) == tp  # every tensor-parallel rank of the last stage
    for logits in seen:
        torch.testing.assert_close(logits, expected_logits, atol=LOGIT_TOLERANCE, rtol=0)
    losses = [loss for answer in answers for loss in answer[key][2]]
    assert losses == pytest.approx([expected_loss] * tp, rel=GRADIENT_TOLERANCE)
    gradients = {name: grad for answer in answers for name, grad in answer[key][1].items()}
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        error = (gradients[name] - expected).abs().max() / expected.abs().max()
        assert error <= GRADIENT_TOLERANCE, f"{name}: {error}"


@layouts(*LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers(run, models, sizes, name):
    """Every token's logits, the EAFT loss, and its gradient for every parameter, in float32."""
    skip_unless_possible(name, sizes[0])
    answers, _ = run(sizes)
    check_answer(answers, name, models[name][0], token_ids(), sizes[0])


@layouts((2, 1), (2, 2))
@pytest.mark.parametrize("name", ranks.SEQUENCE_PARALLEL)
def test_sequence_parallel_equals_transformers(run, models, sizes, name):
    """The local norm marks its parameters, so that sequence parallelism needs no Transformer Engine."""
    answers, _ = run(sizes)
    key = f"{name} sequence_parallel"
    check_answer(answers, key, models[name][0], token_ids()[:, : LENGTH - 1], sizes[0])


@layouts((1, 2))
def test_interleaved_pipeline_equals_transformers(run, models, sizes):
    """Virtual pipeline chunks load the layers that are theirs (0, 2 and 1, 3), and are exported as one model."""
    answers, output = run(sizes)
    check_answer(answers, "interleaved", models["tied"][0], token_ids(), sizes[0])
    check_same_files(models["tied"][1], output / "interleaved")


def read_all(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def check_same_files(source, exported, dtype=torch.float32) -> None:
    expected, actual = read_all(source), read_all(exported)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], tensor.to(dtype)), name


@layouts(*LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_export_is_bitwise_what_was_loaded(run, models, sizes, name):
    """Same names, same bits, same logits in transformers, tokenizer files carried along, no weights of others."""
    from transformers import AutoModelForCausalLM

    skip_unless_possible(name, sizes[0])
    (_, output), pp = run(sizes), sizes[1]
    model, source = models[name]
    check_same_files(source, output / name)
    again, report = AutoModelForCausalLM.from_pretrained(output / name, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(again.eval()(token_ids()).logits, model(token_ids()).logits)
    files = {path.name for path in (output / name).iterdir()}
    shards = {f"model-{i + 1:05d}-of-{pp:05d}.safetensors" for i in range(pp)} if pp > 1 else {"model.safetensors"}
    index = {"model.safetensors.index.json"} if pp > 1 else set()
    assert files == {"config.json", "generation_config.json", "tokenizer_config.json"} | shards | index


@layouts((2, 1), (2, 2))
def test_a_model_in_bfloat16_is_exported_in_bfloat16(run, models, sizes):
    """The training dtype is kept, and config.json says so."""
    _, output = run(sizes)
    assert json.loads((output / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    check_same_files(models["tied"][1], output / "bfloat16", torch.bfloat16)


@layouts((1, 2), (2, 2))
def test_export_that_fails_on_one_rank_fails_on_all(run, sizes):
    """Every rank raises, quoting the rank that could not write, and nothing is left."""
    answers, output = run(sizes)
    for answer in answers:
        assert "no space left" in answer["failed_export"]
    assert [path.name for path in output.iterdir() if "failed" in path.name] == []


def test_tolerances_can_be_missed(models):
    """The yardstick is short enough: q and k of one layer exchanged is far outside."""
    model = tiny_llama("rope_linear")  # q and k have the same shape here
    expected, *_ = transformers_answer(model, token_ids())
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight.data, attention.k_proj.weight.data = (
        attention.k_proj.weight.data,
        attention.q_proj.weight.data,
    )
    actual, *_ = transformers_answer(model, token_ids())
    assert (actual - expected).abs().max() > 100 * LOGIT_TOLERANCE
    assert expected.shape == (2, LENGTH, VOCAB)
