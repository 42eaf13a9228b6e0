"""A training run as a YAML file. Strict: an unknown key is an error that names the nearest valid one.

Every section but ``loss`` is a dataclass below, every key a field of it; the keys of ``loss`` are the loss flags' own
(:func:`loss_keys`). README.md in examples/recipes lists them.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from eaft_megatron.hooks.settings import loss_options
from eaft_megatron.launch.yaml_text import as_written, load_yaml, plain
from eaft_megatron.methods import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model and where it lies.

    Attributes:
        config: the fields of its Hugging Face config.json that shape the model; from them follow the flags.
        checkpoint: what `eaft-megatron convert to-megatron` wrote (pretrain_gpt). Flags recorded there must agree.
        hf: the Hugging Face folder (train).
        transformer_impl: transformer_engine or local.
    """

    config: dict[str, Any] | None = None
    checkpoint: str | None = None
    hf: str | None = None
    transformer_impl: Literal["transformer_engine", "local"] = "transformer_engine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What to train and evaluate on. ``sft_data`` and ``eval`` are folders that `eaft-megatron prepare` wrote."""

    sft_data: str | None = None
    eval: dict[str, str] = dataclasses.field(default_factory=dict)
    jsonl: str | None = None
    seq_length: int = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW and its schedule. ``train_iters`` None: epochs x packs of the prepared folder / global batch size."""

    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    global_batch_size: int = 64
    micro_batch_size: int = 1
    epochs: float = 10
    train_iters: int | None = None
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    bf16: bool = True
    seed: int = 1234


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is laid out over ``nodes`` x ``processes_per_node`` GPUs; the rest is data parallel."""

    nodes: int = 1
    processes_per_node: int = 8
    tensor: int = 1
    pipeline: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What trades time for memory. The last two need Transformer Engine, or a Megatron-LM that knows them."""

    recompute: Literal["none", "selective", "full"] = "full"
    distributed_optimizer: bool = True
    precision_aware_optimizer: bool = False
    optimizer_cpu_offload: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save and what to keep.

    Attributes:
        save_interval: in iterations.
        keep_last: how many of the newest to keep; None: 3, or all where ``keep_every`` is given.
        keep_every: keep the newest, and those of every Nth iteration (Megatron-LM 0.14 on); in place of ``keep_last``.
        async_save: write in the background (Megatron-LM's persistent worker; not tried on a GPU by us).
        export_hf: write a Hugging Face folder at the end (train).
    """

    save_interval: int = 100
    keep_last: int | None = None
    keep_every: int | None = None
    async_save: bool = False
    export_hf: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """In iterations. ``eval_interval`` 0: before and after training only (train), never (pretrain_gpt)."""

    interval: int = 1
    eval_interval: int = 50
    eval_iters: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """What the batch script asks of Slurm.

    Attributes:
        time: the limit, in any of Slurm's forms (minutes, HH:MM:SS, D-HH, ...), longer than ``save_seconds``.
        mounts: FROM[:TO],... of the container; by default the runs and all folders that the recipe names.
        options: further #SBATCH lines, as they stand after the word.
        srun_options: further options of srun, one word each.
    """

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclude: str | None = None
    gpus_per_node: int | None = None
    exclusive: bool = True
    save_seconds: int = 600
    requeue: bool = True
    max_restarts: int = 30
    singleton: bool = True
    preflight: bool = True
    rendezvous: Literal["c10d", "static"] = "c10d"
    setup: str | None = None
    container: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mounts: str | None = None
    options: list[str] = dataclasses.field(default_factory=list)
    srun_options: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. ``entrypoint``: Megatron-LM's pretrain_gpt.py, or train (eaft_megatron.train, without Megatron-LM).

    Attributes:
        name: of the job and of the run folder.
        run_dir: where run folders go: RUN_DIR/NAME.
        megatron_lm: a Megatron-LM checkout; $MEGATRON_LM_PATH where it is not given.
        loss: the values given, by :func:`loss_keys`; a key that is not given leaves its flag out.
        python: the interpreter on the nodes; the one that runs `eaft-megatron launch` where it is not given.
        environment: variables for every process.
        flags: further flags of the entrypoint, as they are.
    """

    name: str
    entrypoint: Literal["pretrain_gpt", "train"] = "pretrain_gpt"
    run_dir: str = "runs"
    megatron_lm: str | None = None
    python: str | None = None
    model: Model
    data: Data = dataclasses.field(default_factory=Data)
    loss: dict[str, Any] = dataclasses.field(default_factory=lambda: {"type": "eaft"})
    optimization: Optimization = dataclasses.field(default_factory=Optimization)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    memory: Memory = dataclasses.field(default_factory=Memory)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    flags: list[str] = dataclasses.field(default_factory=list)


def loss_keys() -> dict[str, Option]:
    """Keys of the ``loss`` section, and the flags that they stand for."""
    return {option.recipe_key: option for option in loss_options() if option.recipe_key}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``section.key=value`` overrides (values in YAML's own spelling).

    Raises:
        ValueError: no such file, not YAML, an unknown key (the nearest valid one is named), a value of another kind.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such recipe: {path}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of keys to values")
    for override in overrides:
        _override(values, override)
    return _build(Recipe, values, "", str(path))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, every default written out: the recipe as resolved."""
    return dataclasses.asdict(recipe)


def _override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ValueError(f"--set takes section.key=value, got {override!r}")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section} is no section")
    values[last] = load_yaml(text)


def _build(kind: type, values: Any, where: str, source: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{source}: {where or 'the recipe'} must be a section, got {values!r}")
    hints, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{source}: unknown key {_join(where, key)}{_nearest(str(key), where, list(fields))}")
    built = {
        key: _loss(value, source)
        if (kind, key) == (Recipe, "loss")
        else _value(hints[key], value, _join(where, key), source)
        for key, value in values.items()
    }
    needed = [
        name
        for name, field in fields.items()
        if name not in built and field.default is field.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ValueError(f"{source}: {_join(where, needed[0])} is missing")
    return kind(**built)


def _loss(values: Any, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{source}: loss must be a section, got {values!r}")
    known = loss_keys()
    for key in values:
        if key not in known:
            raise ValueError(f"{source}: unknown key loss.{key}{_nearest(str(key), 'loss', list(known))}")
    given = {key: _value(known[key].kind | None, value, f"loss.{key}", source) for key, value in values.items()}
    return {"type": "eaft", **{key: value for key, value in given.items() if value is not None}}


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _nearest(key: str, where: str, known: list[str]) -> str:
    """Among the keys of the section, else among those of all sections: most slips are of the second kind."""
    if close := difflib.get_close_matches(key, known, n=1):
        return f": did you mean {_join(where, close[0])}?"
    everywhere = {
        field.name: f"{section.name}.{field.name}"
        for section in dataclasses.fields(Recipe)
        if dataclasses.is_dataclass(kind := typing.get_type_hints(Recipe)[section.name])
        for field in dataclasses.fields(kind)
    }
    everywhere |= {key: f"loss.{key}" for key in loss_keys()}
    everywhere |= {field.name: field.name for field in dataclasses.fields(Recipe)}
    if close := difflib.get_close_matches(key, everywhere, n=1):
        return f": did you mean {everywhere[close[0]]}?"
    return f": known here are {', '.join(known)}"


def _value(hint: Any, value: Any, where: str, source: str) -> Any:
    """The value, as the field's type has it; a number may stand for a float, and YAML reads 1e-5 as a string."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _value(next(kind for kind in arguments if kind is not type(None)), value, where, source)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where, source)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{source}: {where} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return as_written(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    elif hint is bool and isinstance(value, bool):
        return value
    elif origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{index}]", source) for index, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        item = arguments[1]
        return {
            as_written(key): plain(entry) if item is Any else _value(item, entry, _join(where, key), source)
            for key, entry in value.items()
        }
    raise ValueError(f"{source}: {where} must be {_said(hint)}, got {plain(value)!r}")


def _said(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint) or {list: "a list", dict: "a mapping"}[typing.get_origin(hint)]
