"""Where Megatron-LM's training loop finds prepared data, opened once the flags are known. Light to import."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eaft_megatron.data.context_parallel import context_parallel_indices
from eaft_megatron.loss.gates import Gate

if TYPE_CHECKING:
    from eaft_megatron.hooks.prepared_batches import PreparedBatches, Samples


class PreparedSource:
    """The prepared data of this process, once the flags are known: what the hooks ask for it."""

    cut = staticmethod(context_parallel_indices)

    def __init__(self) -> None:
        self.current: PreparedBatches | None = None
        self.carries_columns = False  # whether the host's get_batch lets columns pass; the hooks find out

    def open(self, args: argparse.Namespace, gate: Gate, version: tuple[int, int]) -> PreparedBatches:
        """Open and check what ``args`` ask for; errors as in :class:`PreparedBatches`."""
        from eaft_megatron.hooks.prepared_batches import PreparedBatches

        self.current = PreparedBatches(
            args,
            gate.needs_side,
            with_sequence_ids=gate.needs_sequence_ids,
            version=version,
            tokenizer=_tokenizer(args),
        )
        if self.columns() and not self.carries_columns:
            raise ValueError(
                f"--loss-type {args.loss_type} needs {', '.join(self.columns())} beside each token, and this "
                "Megatron-LM has no get_batch_on_this_tp_rank to carry them: unknown version"
            )
        return self.current

    def columns(self) -> tuple[str, ...]:
        """Names of what travels beside a training batch."""
        if self.current is None:
            return ()
        return (*self.current.train.columns, *(("sequence_ids",) if self.current.with_sequence_ids else ()))

    def evaluation_sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets."""
        return () if self.current is None else tuple(self.current.evaluation)

    def evaluation_dataset(self, name: str, batch_size: int) -> Samples:
        """A set from its first sample on, filled up to whole batches of ``batch_size``."""
        assert self.current is not None  # evaluation_sets() names none before
        return self.current.evaluation_dataset(name, batch_size)

    def provider(self, original: Callable) -> Callable:
        """The script's dataset provider, or ours where ``--sft-data`` was given, known only when it is called.

        Ours builds on tensor-parallel rank 0 of each pipeline stage; Megatron broadcasts from there.
        """
        return _Provider(original, self)


class _Provider:
    def __init__(self, original: Callable, source: PreparedSource) -> None:
        self._original, self._source = original, source
        self.__signature__ = inspect.signature(original)  # Megatron-LM looks for vp_stage in it (0.15 on)

    @property
    def is_distributed(self) -> bool:
        return self._source.current is not None or getattr(self._original, "is_distributed", False)

    def __call__(self, train_val_test_num_samples: Sequence[int], *args: Any, **kwargs: Any):
        data = self._source.current
        if data is None:
            return self._original(train_val_test_num_samples, *args, **kwargs)
        from eaft_megatron.megatron_map import parallel_state

        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return None, None, None
        # Each evaluation opens its sets itself; that there is one is all that Megatron must know.
        placeholder = data.evaluation_dataset(next(iter(data.evaluation)), 1 << 40) if data.evaluation else None
        return data.training_dataset(train_val_test_num_samples[0]), placeholder, None


def _tokenizer(args: argparse.Namespace) -> Any:
    """The job's Hugging Face tokenizer, if it has one."""
    if getattr(args, "tokenizer_type", None) != "HuggingFaceTokenizer" or not getattr(args, "tokenizer_model", None):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(args.tokenizer_model)
