"""Every layout of `layouts.py` against one process, from one checkpoint: first step's losses, weight, gradient norm.

Real Megatron scripts and training loop on gloo, with a stand-in in Transformer Engine's place: this shows that masks,
token order, side columns, process groups and checkpoint keys are right, not what TE's kernels compute. Weights of
standard deviation 0.3 and masks of chats: with smaller weights EAFT's weight is 1, and even masks hide wrong averages.

megatron-core 0.19.2's wheel is tested wherever it is installed (Python 3.12, `make test-megatron-training`), releases
of Megatron-LM where MEGATRON_LM_PATH names a clone. EAFT_LAYOUT_TABLE=FOLDER writes what was seen, as the table of
docs/layouts/layouts.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hooks import layouts
from tests.hooks.layouts import BASE, BLOCKS, FAMILIES, HYBRID_SPEC, LAYOUTS, LOCAL, ROWS, Layout
from tests.hooks.megatron_jobs import JobFailed, Jobs, Result
from tests.hooks.megatron_script import checkout

pytest.importorskip("datasets")
if torch.cuda.is_available():
    pytest.skip("the stand-ins are refused where CUDA is available", allow_module_level=True)

from eaft_megatron.data.prepare import prepare
from eaft_megatron.data.prepare_options import PrepareOptions
from eaft_megatron.data.prepared import PreparedData, write_column
from tests.training.tiny_run import write_inputs

CLONE = os.environ.get("MEGATRON_LM_PATH")
TAGS = os.environ.get("EAFT_LAYOUT_TAGS", "core_v0.16.1 core_v0.19.0").split()
NUMBERS = ("lm loss", "eaft loss", "eaft weight", "eaft entropy", "grad norm")
RELATIVE = 5e-6


def _has_wheel() -> bool:
    return bool(importlib.util.find_spec("megatron")) and bool(importlib.util.find_spec("megatron.training"))


RELEASES = ["wheel"] if _has_wheel() else []
RELEASES += TAGS if CLONE else []
if not RELEASES:
    pytest.skip("needs megatron.training: 0.19.2's wheel, or MEGATRON_LM_PATH", allow_module_level=True)


def _minor(tree: Path) -> int:
    return int(re.search(r"MINOR = (\d+)", (tree / "megatron/core/package_info.py").read_text())[1])


class Release:
    """A release, its data, and its one-process numbers, each computed once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        tree = None if name == "wheel" else checkout(CLONE, name, folder / "releases").parent
        self.minor = 19 if tree is None else _minor(tree)
        self.jobs = Jobs(tree)
        self._checkpoints: dict[str, Path] = {}
        self._references: dict[tuple, dict[str, float]] = {}
        self.data = ["--sft-data", str(folder / "train")]

    def script(self, hybrid: bool) -> str:
        kind = "hybrid" if hybrid else "gpt"
        return f"pretrain_{kind}.py" if self.name != "wheel" else f"pretrain_wheel{'_hybrid' if hybrid else ''}.py"

    def run(self, flags: list[str], *, hybrid: str | None = None, family: str = "dense", **options) -> Result:
        """A job of the family's model; HybridModel's depth is its pattern."""
        depth = ["--num-layers", str(BLOCKS)] if hybrid is None else ["--hybrid-layer-pattern", hybrid, *HYBRID_SPEC]
        grouped = ["--moe-grouped-gemm"] if family == "moe" and "local" not in flags else []
        flags = [*BASE, *depth, *FAMILIES[family][0], *grouped, *flags]
        return self.jobs.run(self.script(bool(hybrid)), flags, **options)

    def checkpoint(self, family: str) -> list[str]:
        """Flags that start from the family's weights, saved once from the TE spec."""
        if family not in self._checkpoints:
            self._checkpoints[family] = self._folder / f"{self.name}-{family}"
            save = ["--save", str(self._checkpoints[family]), "--save-interval", "1", "--lr", "1e-9", *self.data]
            self.run([*save, *ROWS, "--train-iters", "1"], family=family, hybrid=FAMILIES[family][1])
        return ["--load", str(self._checkpoints[family]), "--finetune", "--no-load-optim", "--no-load-rng"]

    def step(self, flags: list[str], *, family: str = "dense", **options) -> dict[str, float]:
        """The first step's numbers, from the family's weights."""
        start = [*self.checkpoint(family), *self.data, "--train-iters", "1"]
        return self.run([*start, *flags], family=family, **options).steps[0]

    def reference(self, layout: Layout) -> dict[str, float]:
        """One process of GPTModel's local spec, with attention masks: nothing of the stand-in.

        A HybridModel whose weights no GPTModel has is compared with itself on one process.
        """
        key, own = (layout.family, layout.loss, layout.packed), FAMILIES[layout.family][1]
        if key not in self._references:
            strictness = ["--dist-ckpt-strictness", "log_all"]  # experts of the local spec have no _extra_state
            local = [*LOCAL, *strictness, *(() if layout.packed else ROWS)]
            flags = [*(local if own is None else layout.flags), *layout.loss]
            self._references[key] = self.step(flags, family=layout.family, hybrid=own)
        return self._references[key]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Chats packed into 128 positions, each row padded for TP 2 x CP 2, with a column of made-up scores."""
    folder = tmp_path_factory.mktemp("layouts")
    write_inputs(folder)
    prepare(
        [str(folder / "train.jsonl")],
        str(folder / "model"),
        folder / "train",
        PrepareOptions(128, pad_to_multiple_of=8),
    )
    prepared = PreparedData(folder / "train")
    generator = np.random.default_rng(1)
    write_column(prepared, "ref_logprob", (-generator.exponential(size=n) for n in prepared.lengths), {})
    return folder


@pytest.fixture(scope="module", params=RELEASES)
def release(request, data) -> Iterator[Release]:
    """One release after the other."""
    release = Release(request.param, data)
    yield release
    release.jobs.close()


@pytest.fixture(scope="module")
def seen(release) -> Iterator[dict[str, float]]:
    """What the table gets: the largest difference of each layout."""
    differences: dict[str, float] = {}
    yield differences
    if folder := os.environ.get("EAFT_LAYOUT_TABLE"):
        write_table(Path(folder), release.name, differences)


def _parameters():
    for name, layout in LAYOUTS.items():
        yield pytest.param(layout, id=name, marks=[pytest.mark.slow] if layout.slow else [])


@pytest.mark.parametrize("layout", list(_parameters()))
def test_a_layout_is_one_process(release, seen, layout, request):
    """Loss, plain loss, weight, entropy and gradient norm of the first step, to 5e-6."""
    if release.minor < layout.since:
        pytest.skip(f"Megatron-LM 0.{release.minor} cannot do this: 0.{layout.since} on")
    expected = release.reference(layout)
    sizes = dict(layout.sizes, ranks=layout.ranks)
    flags = [*layout.flags, *layout.loss]
    actual = release.step(flags, family=layout.family, hybrid=layout.hybrid, **sizes)
    differences = {name: abs(actual[name] / expected[name] - 1) for name in NUMBERS}
    seen[next(name for name, other in LAYOUTS.items() if other is layout)] = max(differences.values())
    assert max(differences.values()) <= RELATIVE, f"{differences}, {actual}, {expected}"


def test_packs_of_a_hybrid_model_are_not_masked(release):
    """Its attention is Transformer Engine's whatever --transformer-impl says, and would look across the rows."""
    if release.minor < 19:
        pytest.skip("HybridModel is tested from 0.19 on")
    for packing, message in (("auto", "needs --sft"), ("mask", "no HybridModel")):
        with pytest.raises(JobFailed, match=message):
            release.step([*LOCAL, *layouts.EAFT, "--sft-packing", packing], hybrid="*-*-*-*-")


def test_a_spec_that_says_otherwise_is_seen_in_the_model(release):
    """--transformer-impl local with Transformer Engine's layers: refused once the model is there."""
    spec = ["--spec", "eaft_megatron.models.glm4_spec", "GLM4_LAYER_SPEC_TE"]
    with pytest.raises(JobFailed, match="which ignores the mask"):
        release.run([*LOCAL, *spec, *layouts.EAFT, *release.data, "--train-iters", "1"])


def test_skipped_iterations_take_their_batches(release):
    """--iterations-to-skip: the second step's loss is that of the second batch from the weights that were loaded."""
    flags = [*LOCAL, *layouts.LAYOUTS["THD, CP 2, sft-kl"].loss, "--lr", "1e-12", "--train-iters", "2"]
    start = [*release.checkpoint("dense"), *release.data]
    expected = release.run([*start, *flags]).steps[1]
    skipped = release.run([*start, *flags, "--iterations-to-skip", "1"]).steps
    assert skipped[-1]["eaft loss"] == pytest.approx(expected["eaft loss"], rel=RELATIVE)


@pytest.mark.slow
def test_expert_communication_overlapped(release):
    """Megatron's schedule plans call the model's parts themselves (bf16 only): the numbers without the overlap."""
    if release.minor < 18:
        pytest.skip("the plans are tested from 0.18 on")
    flags = [*ROWS, *layouts.EAFT, "--bf16", "--num-layers-per-virtual-pipeline-stage", "1"]
    options = dict(family="moe", ranks=4, pp=2, ep=2)
    expected = release.step(flags, **options)
    actual = release.step([*flags, "--overlap-moe-expert-parallel-comm"], **options)
    for name in NUMBERS:
        assert actual[name] == pytest.approx(expected[name], rel=RELATIVE), name


def test_the_numbers_tell_layouts_apart(release):
    """What the comparison rests on: weights and masks under which a wrong order or a wrong average shows."""
    one = release.reference(LAYOUTS["THD"])
    rows = release.reference(LAYOUTS["rows"])
    assert 0.5 < one["eaft weight"] < 0.95
    assert abs(one["eaft loss"] / rows["eaft loss"] - 1) > 1e-3  # packs hold other rows than single samples


def write_table(folder: Path, release: str, differences: dict[str, float]) -> None:
    """Add a release's column to the table: its JSON, then the page from all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{release}.json").write_text(json.dumps(differences, indent=1) + "\n")
    columns = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "Largest relative difference of a layout's first step from one process's; empty: the release cannot do it."
    ]
    lines += ["Written by tests/hooks/test_production_layouts.py, with a stand-in for Transformer Engine.", ""]
    lines += ["| layout | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in layouts.LAYOUTS:
        cells = [f"{column[name]:.0e}" if name in column else "" for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(re.sub(r"^0e\+00$", "0", cell) for cell in cells) + " |")
    (folder / "layouts.md").write_text("\n".join(lines) + "\n")


MODELS = {"llama": "LlamaForCausalLM", "glm4": "Glm4ForCausalLM"}


def _tiny(family: str, folder: Path) -> Path:
    """A random model of the data's vocabulary, its weights large enough that EAFT's are not 1."""
    import transformers

    options = dict(vocab_size=layouts.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS)
    options |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    options |= dict(initializer_range=0.2, tie_word_embeddings=False, pad_token_id=None)
    config = {"llama": transformers.LlamaConfig, "glm4": transformers.Glm4Config}[family](**options)
    torch.manual_seed(0)
    getattr(transformers, MODELS[family])(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MODELS)
def test_a_converted_model_as_a_hybrid_one(release, family, tmp_path):
    """From one converted checkpoint: GPTModel's numbers, at TP 2 and PP 2 too; saved and back, the same tensors."""
    from eaft_megatron.models.convert import convert_to_hf, convert_to_megatron
    from eaft_megatron.models.hf_config import read_hf_config
    from eaft_megatron.models.pretrain_flags import pretrain_flags, pretrain_hybrid_flags

    if release.minor < 19:
        pytest.skip("HybridModel is tested from 0.19 on")
    source = _tiny(family, tmp_path / "hf")
    convert_to_megatron(source, tmp_path / "megatron")
    config = read_hf_config(source)
    start = [*BASE, *release.data, "--load", str(tmp_path / "megatron"), "--finetune", "--train-iters", "1"]
    start += ["--no-load-optim", "--no-load-rng", *layouts.EAFT]

    def step(script: str, flags: list[str], *more: str, **sizes) -> dict[str, float]:
        return release.jobs.run(script, [*start, *flags, *BASE, *more], **sizes).steps[0]

    gpt, hybrid = release.script(False), release.script(True)
    expected = step(gpt, pretrain_flags(config, transformer_impl="local"))
    flags = pretrain_hybrid_flags(config)
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1", "--lr", "0", "--min-lr", "0"]
    actual = {"one": step(hybrid, flags, *layouts.THD, *save)}
    actual["tp2"] = step(hybrid, flags, *layouts.THD, *layouts.SEQUENCE_PARALLEL, ranks=2, tp=2)
    staged = pretrain_hybrid_flags(config, pipeline_model_parallel_size=2)
    actual["pp2"] = step(hybrid, staged, *layouts.THD, ranks=2, pp=2)
    for layout, numbers in actual.items():
        for name in NUMBERS:
            assert numbers[name] == pytest.approx(expected[name], rel=RELATIVE), (layout, name)
    convert_to_hf(tmp_path / "run", tmp_path / "back", hf_config_dir=source)
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
