"""Imports run one way: loss <- hooks <- train. Held on the syntax trees, so that lazy imports count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "eaft_megatron"
HOST = {"megatron", "apex", "transformer_engine"}
OURS = "eaft_megatron"


def _imports(path: Path) -> set[str]:
    """Every module a file names in an import, as absolute dotted names; relative imports resolved."""
    package = (OURS, *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def _violations(path: Path) -> list[str]:
    """What this file imports and must not."""
    place = path.relative_to(ROOT).as_posix()
    imports = _imports(path)
    roots = {name.partition(".")[0] for name in imports}
    ours = {name for name in imports if name == OURS or name.startswith(f"{OURS}.")}
    bad: set[str] = set()

    def forbid(*prefixes: str) -> None:
        bad.update(name for name in ours if any(f"{name}.".startswith(f"{OURS}.{prefix}.") for prefix in prefixes))

    if place == "__init__.py":
        bad |= roots & (HOST | {"transformers", "datasets", "yaml"})
        forbid("megatron_map", "hooks", "models", "data", "training", "train", "testing", "analysis", "launch")
    if place == "megatron_map.py":
        bad |= roots - set(sys.stdlib_module_names)
    if place.startswith("loss/"):
        bad |= roots - {"torch", "triton", OURS, *sys.stdlib_module_names}
        forbid(
            "megatron_map", "methods", "hooks", "models", "data", "training", "train", "testing", "analysis", "launch"
        )
    if place == "methods.py":
        forbid("megatron_map", "hooks", "models", "data", "training", "train", "testing", "analysis", "launch")
    if place.startswith("loss/kernels/"):
        bad |= {name for name in imports if name.startswith("torch.distributed")}
    if place == "loss/reference.py":
        bad |= ours
    if place.startswith("hooks/"):
        forbid("models", "training", "train", "testing", "analysis", "launch")
    if place.startswith(("models/", "data/", "analysis/")):
        forbid("hooks", "training", "train", "testing", "launch")
    # The stand-ins are for tests and for the CPU path of the entrypoints, and this is where those enter them.
    if not place.startswith("testing/") and place not in ("training/setup.py", "run.py"):
        forbid("testing")
    return sorted(bad)


FILES = sorted(ROOT.rglob("*.py"))
TESTS_ROOT = Path(__file__).resolve().parent
TESTS = sorted(path for path in TESTS_ROOT.rglob("*.py") if path != Path(__file__).resolve())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downwards(path):
    """No file imports what lies above it."""
    assert _violations(path) == []


def test_a_violation_is_seen(tmp_path, monkeypatch):
    """The rule above is not vacuous: hooks would not pass as loss."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "loss").mkdir()
    path = tmp_path / "loss" / "imagined.py"
    path.write_text("def f():\n    from ..hooks import install\n    import megatron.core\n")
    assert _violations(path) == [f"{OURS}.hooks", f"{OURS}.hooks.install", "megatron"]


def _imported_test_modules(path: Path) -> list[str]:
    """What of test modules a file imports, also in programs that it holds as text for another interpreter."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += re.findall(r"\b(?:from|import) ([\w.]*\btest_\w+)", node.value)
    return [name for name in names if re.search(r"(^|\.)test_", name)]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(TESTS_ROOT).as_posix())
def test_no_helper_is_imported_out_of_a_test_module(path):
    """What two test modules need lies in a plain one: importing a test module would run or rename its tests."""
    assert _imported_test_modules(path) == []


def test_an_import_of_a_test_module_is_seen(tmp_path):
    """Absolute, relative, within a function, and within the text of a program."""
    path = tmp_path / "helpers.py"
    path.write_text(
        "from .test_a import f\nfrom tests import cases, test_d\n"
        "def g():\n    import tests.test_b\nrun('from tests.test_c import h')\n"
    )
    assert sorted(_imported_test_modules(path)) == ["test_a.f", "tests.test_b", "tests.test_c", "tests.test_d"]


def test_importing_the_package_needs_torch_alone():
    """`import eaft_megatron` pulls in neither Megatron nor transformers nor our own upper layers."""
    code = (
        "import sys, eaft_megatron, eaft_megatron.hooks, eaft_megatron.models\n"
        "bad = {'megatron', 'transformers', 'datasets', 'triton', 'safetensors', 'yaml'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
