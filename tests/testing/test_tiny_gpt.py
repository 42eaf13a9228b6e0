"""Real megatron-core on CPU and gloo: the same model, data and weights give the same losses in every layout."""

import importlib.util
import math
import warnings
from collections.abc import Callable

import pytest
import torch

from eaft_megatron.testing import run_distributed
from tests.worlds import once

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

STEPS = 3
PLAIN = dict(tp=1, pp=1, vpp=None, distributed=False)
LAYOUTS = {  # name: (processes, what differs from PLAIN); the rest of the processes are data parallel
    "tp2": (2, dict(tp=2)),
    "tp2 distributed optimizer": (2, dict(tp=2, distributed=True)),
    "tp2 sequence parallel": (2, dict(tp=2, sequence_parallel=True)),
    "pp2": (2, dict(pp=2)),
    "pp2 distributed optimizer": (2, dict(pp=2, distributed=True)),
    "pp2 interleaved": (2, dict(pp=2, vpp=2)),
    "pp2 interleaved distributed optimizer": (2, dict(pp=2, vpp=2, distributed=True)),
    "dp2": (2, dict()),
    "dp2 distributed optimizer": (2, dict(distributed=True)),
    "dp2 distributed optimizer overlapped": (2, dict(distributed=True, overlap=True)),
    "one process distributed optimizer": (1, dict(distributed=True)),
}
TIED = {"tp2 tied": (2, dict(tp=2)), "pp2 tied": (2, dict(pp=2)), "pp2 interleaved tied": (2, dict(pp=2, vpp=2))}
FOUR = {
    "tp2 pp2": (4, dict(tp=2, pp=2)),
    "tp2 pp2 distributed optimizer": (4, dict(tp=2, pp=2, distributed=True)),
    "tp2 pp2 interleaved": (4, dict(tp=2, pp=2, vpp=2)),
    "tp2 dp2 distributed optimizer": (4, dict(tp=2, distributed=True)),
}
TIED = {name: (processes, {**differs, "share_embeddings": True}) for name, (processes, differs) in TIED.items()}


def batch(step):
    from eaft_megatron.testing import tiny_gpt

    return tiny_gpt.global_batch(step, samples=4)


def train(layouts):
    """In each rank: {layout: [(loss, grad norm) per step]}."""
    warnings.simplefilter("ignore")
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        return {name: train_one(**{**PLAIN, **options}) for name, options in layouts.items()}


def train_one(tp, pp, vpp, distributed, share_embeddings=False, overlap=False, **config):
    from eaft_megatron.testing import tiny_gpt

    with tiny_gpt.model_parallel(tp, pp, vpp):
        chunks = tiny_gpt.build_tiny_gpt(tiny_gpt.tiny_config(**config), share_embeddings=share_embeddings)
        model, optimizer = tiny_gpt.with_optimizer(chunks, distributed=distributed, overlap=overlap)
        return [tiny_gpt.train_step(model, optimizer, batch(step)) for step in range(STEPS)]


def _results(processes):
    """All layouts of that many processes in one run: most of a process's time is importing megatron-core."""
    cases = {**LAYOUTS, **TIED, **FOUR}
    layouts = {name: differs for name, (size, differs) in cases.items() if size == processes}
    if processes == 1:
        layouts |= {"one process": {}, "one process tied": {"share_embeddings": True}}
        half = dict(params_dtype=torch.bfloat16, bf16=True, masked_softmax_fusion=True)
        layouts |= {"bf16": half, "bf16 distributed optimizer": {**half, "distributed": True}}
    return run_distributed(train, processes, layouts, timeout=150)


@pytest.fixture(scope="module")
def results() -> Callable:
    """What `_results` returns, computed once for each argument."""
    return once(_results)


def assert_equal_training(results, name, processes, reference):
    expected = results(1)[0][reference]
    for actual in results(processes):
        for step in range(STEPS):
            assert actual[name][step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(results, name):
    """Three steps through megatron-core's schedules, against one process; unequal masks, so reductions show."""
    assert_equal_training(results, name, LAYOUTS[name][0], "one process")


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_train_alike_in_every_layout(results, name):
    """First and last stage hold copies of one matrix whose gradients must be added."""
    assert_equal_training(results, name, TIED[name][0], "one process tied")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_like_one(results, name):
    """Two dimensions of parallelism at once."""
    assert_equal_training(results, name, 4, "one process")


def test_training_is_not_trivial(results):
    """Losses start near log(vocabulary size), change, and tell tied from untied models."""
    losses = [loss for loss, _ in results(1)[0]["one process"]]
    assert abs(losses[0] - math.log(96)) < 1.5 and len(set(losses)) == STEPS
    assert losses[0] != pytest.approx(results(1)[0]["one process tied"][0][0], rel=1e-3)


def test_half_precision_trains_close_to_single(results):
    """The optimizers that keep single-precision masters, found by the parameters' type names."""
    actual = results(1)[0]
    for step in range(STEPS):
        assert actual["bf16"][step] == pytest.approx(actual["bf16 distributed optimizer"][step], rel=1e-3)
        assert actual["bf16"][step] == pytest.approx(actual["one process"][step], rel=2e-2)
        assert actual["bf16"][step] != actual["one process"][step]


def first_loss_by_hand():
    warnings.simplefilter("ignore")
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        from eaft_megatron.testing import tiny_gpt

        with tiny_gpt.model_parallel():
            (model,) = tiny_gpt.build_tiny_gpt(tiny_gpt.tiny_config())
            first = batch(0)
            logits = model(first["tokens"], first["position_ids"], None).double()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), first["labels"].flatten(), reduction="none"
            )
            mask = first["loss_mask"].flatten()
            return float((losses * mask).sum() / mask.sum()), mask.view(4, -1).sum(1).unique().numel()


def test_the_first_loss_is_the_masked_mean_of_the_cross_entropy(results):
    """An independent computation of what the schedule, the loss function and the reduction give together."""
    expected, lengths = run_distributed(first_loss_by_hand, 1)[0]
    assert results(1)[0]["one process"][0][0] == pytest.approx(expected, rel=1e-5)
    assert lengths > 2, "the loss masks must differ for this to mean anything"


CHECKPOINTS = {  # name: (layout that saves, layout that loads, distributed optimizer)
    "tp2 to pp2": (dict(tp=2), dict(pp=2), False),
    "tp2 to pp2, distributed optimizer": (dict(tp=2), dict(pp=2), True),
    "dp2 to tp2, distributed optimizer": (dict(), dict(tp=2), True),
    "interleaved to dp2, distributed optimizer": (dict(pp=2, vpp=2), dict(), True),
}


def save_and_load(folders):
    """{case: (steps 1 and 2 trained on, steps 1 and 2 after loading into another layout and other weights)}."""
    warnings.simplefilter("ignore")
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        return {name: save_and_load_one(folder, *CHECKPOINTS[name]) for name, folder in folders.items()}


def save_and_load_one(folder, saving, loading, distributed):
    from megatron.core import dist_checkpointing

    from eaft_megatron.testing import tiny_gpt

    def build(seed):
        return tiny_gpt.with_optimizer(
            tiny_gpt.build_tiny_gpt(tiny_gpt.tiny_config(), seed=seed), distributed=distributed
        )

    def two_steps(model, optimizer):
        return [tiny_gpt.train_step(model, optimizer, batch(step)) for step in (1, 2)]

    with tiny_gpt.model_parallel(**saving):
        model, optimizer = build(seed=1)
        tiny_gpt.train_step(model, optimizer, batch(0))
        dist_checkpointing.save(tiny_gpt.sharded_state(model, optimizer, loading=False), folder)
        expected = two_steps(model, optimizer)
    with tiny_gpt.model_parallel(**loading):
        model, optimizer = build(seed=2)
        state = dist_checkpointing.load(tiny_gpt.sharded_state(model, optimizer, loading=True), folder)
        tiny_gpt.load_sharded_state(model, optimizer, state)
        return expected, two_steps(model, optimizer)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {name: str(tmp_path_factory.mktemp("checkpoint")) for name in CHECKPOINTS}
    return run_distributed(save_and_load, 2, folders, timeout=150)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_carries_weights_and_optimizer_into_another_layout(name, checkpoints):
    """Two steps after loading: the first shows the weights, the second Adam's moments and step count."""
    for rank in checkpoints:
        expected, actual = rank[name]
        assert actual == [pytest.approx(pair, rel=1e-5) for pair in expected]
