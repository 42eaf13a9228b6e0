"""The map of Megatron, walked: each symbol is where it says in the installed release and in every tag of a clone."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import os
import re
from pathlib import Path

import pytest

from eaft_megatron import megatron_map
from eaft_megatron.megatron_map import SYMBOLS, Symbol
from eaft_megatron.models.hf_config import architecture_of
from eaft_megatron.testing import run_distributed
from tests.megatron_releases import Parameters, Source
from tests.models.tiny import FAMILIES, SIZES

ROOT = Path(__file__).resolve().parents[1] / "eaft_megatron"
TAGS = (
    *("core_v0.12.3", "core_v0.13.1", "core_v0.14.0", "core_v0.15.3", "core_v0.16.1"),
    *("core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "main"),
)


def _fault(symbol: Symbol, parameters: Parameters | None) -> str | None:
    """What is wrong with the parameters of a symbol that is there."""
    if not symbol.parameters:
        return None
    if parameters is None:
        return "takes no parameters"
    lacking = [name for name in symbol.parameters if name not in parameters.names and not parameters.open]
    if lacking:
        return f"takes no {', '.join(lacking)}"
    if symbol.exactly and parameters.names != symbol.parameters:
        return f"takes ({', '.join(parameters.names)})"
    return None


def _faults(release: tuple[int, int], look_up, symbols: dict[str, Symbol] = SYMBOLS) -> list[str]:
    """Where a release and the map differ. ``look_up(symbol)``: its parameters or None; LookupError: there is none."""
    faults = []
    for key, symbol in symbols.items():
        try:
            fault = _fault(symbol, look_up(symbol))
        except LookupError:
            fault = "is not there"
        if symbol.is_in(release) and fault:
            faults.append(f"{key}: {symbol.module}.{symbol.name} {fault}")
        if not symbol.is_in(release) and not fault:
            faults.append(f"{key}: {symbol.module}.{symbol.name} is there, which the map does not expect")
    return faults


def _in_source(source: Source, symbol: Symbol) -> Parameters | None:
    place = source.find(symbol.module, symbol.name)
    if place is None:
        raise LookupError
    return source.parameters(place)


def _installed(symbol: Symbol) -> Parameters | None:
    try:
        value = symbol.find()
    except (AttributeError, ModuleNotFoundError):
        raise LookupError from None
    if not symbol.parameters:
        return None
    parameters = inspect.signature(value).parameters
    named = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    return Parameters(tuple(named), len(named) < len(parameters))


def _walk_installed() -> list[str]:
    """In a process of its own: it imports far more than other tests want."""
    from eaft_megatron.testing.cpu import cpu_standins

    with cpu_standins():
        core = {key: value for key, value in SYMBOLS.items() if value.module.startswith("megatron.core")}
        symbols = core if megatron_map.training_loop_missing() else SYMBOLS
        symbols = {key: value for key, value in symbols.items() if key != "TENorm"}  # needs Transformer Engine
        return _faults(megatron_map.release(), _installed, symbols)


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_the_installed_release_is_as_the_map_says():
    """Every symbol that this release shall have imports and takes our parameters, and no other does."""
    assert run_distributed(_walk_installed, 1) == [[]]


def _clone() -> Path | None:
    folder = os.environ.get("MEGATRON_LM_PATH")
    return Path(folder) if folder else None


def _revisions() -> list[str]:
    """MEGATRON_TAG alone, or the last tag of each release and main."""
    return os.environ.get("MEGATRON_TAG", " ".join(TAGS)).split()


@pytest.mark.skipif(_clone() is None, reason="MEGATRON_LM_PATH does not name a clone of NVIDIA/Megatron-LM")
@pytest.mark.parametrize("revision", _revisions())
def test_a_release_is_as_the_map_says(revision):
    """The same on the source of a release that is not installed."""
    source = Source(_clone(), revision)
    symbols = {key: value for key, value in SYMBOLS.items() if not value.built}
    assert _faults(source.release, functools.partial(_in_source, source), symbols) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "LanguageModule.compute_loss"}, "is not there"),
        ({"module": "megatron.core.models.language"}, "is not there"),
        ({"parameters": ("self", "labels", "scores")}, "takes no scores"),
        ({"parameters": ("self", "labels")}, "takes (self, labels, logits)"),
        ({"since": (99, 0)}, "is there, which the map does not expect"),
        ({"until": (0, 16)}, "is there, which the map does not expect"),
    ],
)
def test_a_wrong_entry_is_seen(changes, expected):
    """The walk is not vacuous: each way in which an entry can be wrong is reported."""
    pytest.importorskip("megatron.core")
    import dataclasses

    right = SYMBOLS["LanguageModule.compute_language_model_loss"]
    assert _faults((0, 16), _installed, {"loss": right}) == []
    (fault,) = _faults((0, 16), _installed, {"loss": dataclasses.replace(right, **changes)})
    assert fault.endswith(expected)


def _sources() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path.name != "megatron_map.py"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_tables_of_models_give_is_on_the_map(family):
    """Each family's arguments for TransformerConfig and GPTModel, which no call spells out."""
    name, sizes = FAMILIES[family]
    hf_config = {**SIZES, "architectures": [f"{name}ForCausalLM"], **sizes}
    architecture = architecture_of(hf_config)
    assert architecture.transformer_fields(hf_config).keys() <= set(SYMBOLS["TransformerConfig"].parameters)
    for rope in ({}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0}):
        fields = architecture.model_fields({**hf_config, "rope_parameters": rope})
        assert fields.keys() <= set(SYMBOLS["GPTModel"].parameters)


def test_no_other_file_names_megatrons_modules():
    """Imports and strings: what leads into Megatron goes through the map."""
    strays = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                modules = [node.value] if re.fullmatch(r"megatron\.(core|training)[\w.]*", node.value) else []
            strays += [f"{path.name}:{node.lineno} {name}" for name in modules if name.split(".")[0] == "megatron"]
    assert strays == []


def _uses(path: Path) -> set[tuple[str, tuple[str, ...]]]:
    """(key of the map, parameters given by name) of all that a file takes from the map and from its modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    local = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "eaft_megatron.megatron_map"
        for alias in node.names
        if alias.name in SYMBOLS
    }
    uses: set[tuple[str, tuple[str, ...]]] = {(key, ()) for key in local.values()}

    def key_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return local.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := key_of(node.value)) and not SYMBOLS[owner].name:
            return f"{owner}.{node.attr}"
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (key := key_of(node)):
            uses.add((key, ()))
        if isinstance(node, ast.Call) and (key := key_of(node.func)):
            uses.add((key, tuple(keyword.arg for keyword in node.keywords if keyword.arg)))
    return uses


@pytest.mark.parametrize("path", _sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_used_is_on_the_map(path):
    """Every attribute of a module of Megatron, and every parameter that a call gives by name, has its entry."""
    missing = []
    for key, parameters in sorted(_uses(path)):
        if key.endswith((".__name__", ".__file__")):
            continue
        held = SYMBOLS.get(key)
        takes = set() if held is None else set(held.parameters)
        if held is None or (parameters and not set(parameters) <= takes):
            missing.append((key, sorted(set(parameters) - takes)))
    assert missing == []
