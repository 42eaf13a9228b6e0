"""Every layout of `layouts.py` against one process, from one checkpoint: first step's losses, weight, gradient norm.

Real Megatron scripts and training loop on gloo, with a stand-in in Transformer Engine's place: this shows that masks,
token order, side columns, process groups and checkpoint keys are right, not what TE's kernels compute. Weights of
standard deviation 0.3 and masks of chats: with smaller weights EAFT's weight is 1, and even masks hide wrong averages.

megatron-core 0.19.2's wheel is tested wherever it is installed (Python 3.12, `make test-megatron-training`), releases
of Megatron-LM where MEGATRON_LM_PATH names a clone. EAFT_LAYOUT_TABLE=FOLDER writes what was seen, as the table of
docs/layouts.md.
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
from tests.hooks.megatron_jobs import Jobs, Result
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


class Release:
    """A release, its data, and its one-process numbers, each computed once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        tree = None if name == "wheel" else checkout(CLONE, name, folder / "releases").parent
        self.minor = 19 if name == "wheel" else int(name.removeprefix("core_v0.").partition(".")[0])
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
    lines = ["| layout | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in layouts.LAYOUTS:
        cells = [f"{column[name]:.0e}" if name in column else "" for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(re.sub(r"^0e\+00$", "0", cell) for cell in cells) + " |")
    (folder / "layouts.md").write_text("\n".join(lines) + "\n")
