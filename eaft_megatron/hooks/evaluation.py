"""Several evaluation sets side by side, in any release: each evaluated and logged under its own name."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def evaluate_sets(names: Callable[[], Sequence[str]], dataset: Callable[[str, int], Any]) -> None:
    """Have Megatron-LM evaluate each named set wherever it would evaluate its own.

    Every evaluation begins with a set's first sample and takes ``--eval-iters`` global batches of it, or all of it if
    that is less. In TensorBoard and wandb its curves stand under ``NAME/``.

    Args:
        names: of the sets; none: Megatron evaluates as it always does.
        dataset: (name, global batch size) -> the set, filled up to whole batches.
    """
    from eaft_megatron.megatron_map import training

    original = training.evaluate_and_print_results
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate_each(*args: Any, **kwargs: Any):
        result = None
        if not names():
            return original(*args, **kwargs)
        flags = training.get_args()
        for name in names():
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            batch_size = getattr(flags, "eval_global_batch_size", None) or flags.global_batch_size
            samples = dataset(name, batch_size)
            given["prefix"] = f"{given['prefix']} ({name})"
            given["data_iterator"] = _iterators(training, samples, len(given["model"]))
            before = flags.eval_iters
            flags.eval_iters = min(before, len(samples) // batch_size)
            with _curves_under(training, name), _mean_over_tokens(training, flags):
                try:
                    result = original(*bound.args, **bound.kwargs)
                finally:
                    flags.eval_iters = before
        return result

    training.evaluate_and_print_results = evaluate_each


def _iterators(training: Any, samples: Any, chunks: int) -> Any:
    """An iterator for each model chunk, where this rank reads data."""
    from eaft_megatron.megatron_map import RerunDataIterator, parallel_state

    def one() -> Any:
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return None
        return RerunDataIterator(iter(training.build_pretraining_data_loader(samples, 0)))

    return one() if chunks == 1 else [one() for _ in range(chunks)]


@contextlib.contextmanager
def _mean_over_tokens(training: Any, flags: Any) -> Iterator[None]:
    """Under --sft Megatron averages an evaluation over micro-batches, so that one without a token would be NaN or 0."""
    before = training.get_args
    training.get_args = lambda: _WithoutSft(flags)
    try:
        yield
    finally:
        training.get_args = before


class _WithoutSft:
    """Megatron's flags as ``evaluate`` shall see them: it then sums over tokens, as it does without --sft."""

    def __init__(self, flags: Any) -> None:
        object.__setattr__(self, "_flags", flags)

    def __getattr__(self, name: str) -> Any:
        return False if name == "sft" else getattr(self._flags, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._flags, name, value)


class _curves_under:
    """While in force, Megatron's writers put ``NAME/`` before every curve."""

    def __init__(self, training: Any, name: str) -> None:
        self._training, self._name = training, name

    def __enter__(self) -> None:
        training = self._training
        self._before = training.get_tensorboard_writer, training.get_wandb_writer
        board, wandb = (get() for get in self._before)
        training.get_tensorboard_writer = lambda: board and _Board(board, self._name)
        training.get_wandb_writer = lambda: wandb and _Wandb(wandb, self._name)

    def __exit__(self, *error: object) -> None:
        self._training.get_tensorboard_writer, self._training.get_wandb_writer = self._before


class _Board:
    def __init__(self, writer: Any, name: str) -> None:
        self._writer, self._name = writer, name

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> None:
        self._writer.add_scalar(f"{self._name}/{tag}", *args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._writer, attribute)


class _Wandb:
    def __init__(self, writer: Any, name: str) -> None:
        self._writer, self._name = writer, name

    def log(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._writer.log({f"{self._name}/{tag}": value for tag, value in values.items()}, *args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._writer, attribute)
