"""Prepared data in Megatron-LM's training loop: what takes the place of the script's dataset provider.

Each sample holds what Megatron's own datasets hold, in the form that the release's ``get_batch`` expects.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eaft_megatron.data.batches import epoch_order
from eaft_megatron.data.prepared import PreparedData, content_of, evaluation_folders, training_folder
from eaft_megatron.data.samples import PreparedDataset, block_diagonal_mask
from eaft_megatron.megatron_map import (
    PACKED_BOUNDARIES_ON_EVERY_STAGE,
    READS_PACKED_BOUNDARIES,
    SEVERAL_PACKS_IN_A_MICRO_BATCH,
)


class PreparedBatches:
    """``--sft-data`` and ``--sft-eval-data`` of one job.

    Args:
        args: Megatron-LM's parsed and validated flags, with ours among them.
        columns: per-token columns that the loss needs ("ref_logprob", "sample_weight"); of the training data alone,
            since evaluation shows the plain cross entropy.
        with_sequence_ids: whether the loss must tell the rows of a pack apart.
        version: megatron-core's (major, minor).
        tokenizer: of the model, to be compared with the data's; None where the job has none of Hugging Face.

    Raises:
        ValueError: data that does not fit the flags or the model.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        columns: Sequence[str] = (),
        *,
        with_sequence_ids: bool = False,
        version: tuple[int, int],
        tokenizer: Any = None,
    ) -> None:
        self.args = args
        self._tokenizer = tokenizer
        folders = {**evaluation_folders(args.sft_data), **{name: Path(p) for name, p in args.sft_eval_sets.items()}}
        training = PreparedData(training_folder(args.sft_data))
        _refuse_what_is_not_ours(args)
        self.layout = choose_layout(args, training.manifest["packing"] is not None, version)
        packed = self.layout.packed
        self._pad_boundaries = version >= SEVERAL_PACKS_IN_A_MICRO_BATCH
        self.with_sequence_ids = with_sequence_ids and (packed or self.layout.thd)
        self.train = self._open(training, packed, columns)
        self.evaluation = {name: self._open(PreparedData(path), packed, ()) for name, path in folders.items()}

    def _open(self, data: PreparedData, packed: bool, columns: Sequence[str]) -> PreparedDataset:
        if self._tokenizer is not None:
            data.check_tokenizer(self._tokenizer)
        vocabulary = self.args.true_vocab_size or getattr(self.args, "padded_vocab_size", None)
        if vocabulary is not None and data.max_token_id >= vocabulary:
            raise ValueError(
                f"{data.path} has token id {data.max_token_id}, but the vocabulary ends at {vocabulary - 1}: it was "
                "prepared with the tokenizer of another model"
            )
        cut = 2 * self.args.context_parallel_size if self.args.context_parallel_size > 1 else 1
        if self.layout.thd and self.args.context_parallel_size > 1:
            if not packed:
                raise ValueError(
                    f"--context-parallel-size {self.args.context_parallel_size} with --sft cuts each row into {cut} "
                    "equal pieces, which single rows are not padded for: remove --sft (each sample is then cut as a "
                    f"whole), or pack them: `eaft-megatron prepare --repack {data.path} --seq-length "
                    f"{self.args.seq_length} --pad-to-multiple-of {cut}` and no --sft-packing none"
                )
            multiple = data.manifest["packing"]["pad_to_multiple_of"]
            if multiple % cut:
                raise ValueError(
                    f"{data.path}: --context-parallel-size {self.args.context_parallel_size} cuts each row into {cut} "
                    f"pieces, but rows are padded to multiples of {multiple}: `eaft-megatron prepare --repack "
                    f"{data.path} --seq-length {self.args.seq_length} --pad-to-multiple-of {cut}`"
                )
        return PreparedDataset(data, self.args.seq_length, packed=packed, columns=columns)

    def describe(self) -> list[str]:
        """What is trained and evaluated on, for the log."""
        lines = []
        for name, dataset in {"training": self.train, **self.evaluation}.items():
            lines.append(f"{name} data: {dataset.path}, {len(dataset)} samples, {self.layout.text}")
        return lines

    def fingerprint(self) -> str:
        """SHA-256 of what decides the order of the samples and their content: a resumed job must find the same."""
        content = [content_of(self.train.data.manifest), self.layout.packed, self.args.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def training_dataset(self, samples: int) -> Samples:
        """``samples`` samples, epoch after epoch, each epoch in an order of its own that follows from ``--seed``."""
        self.train.compute_columns()
        # One batch more than is asked for: a job that is started again when it is done must find a sample to wait for.
        return Samples(self, self.train, samples + self.args.global_batch_size, seed=self.args.seed, side=True)

    def evaluation_dataset(self, name: str, batch_size: int) -> Samples:
        """A set from its first sample on, filled up to whole batches with samples whose loss mask is 0."""
        dataset = self.evaluation[name]
        return Samples(self, dataset, -(-len(dataset) // batch_size) * batch_size, seed=None, side=True)

    def form(self, dataset: PreparedDataset, index: int, side: bool) -> dict[str, torch.Tensor]:
        """Sample ``index`` as Megatron's get_batch takes it: ``[s]`` each, and what keeps rows apart."""
        sample = dataset[index]
        ids = sample.pop("sequence_ids", None)
        if self.layout.thd:
            sample |= self._boundaries(dataset.boundaries(index))
        elif self.args.create_attention_mask_in_dataloader:
            one_row = torch.zeros_like(sample["tokens"])
            sample["attention_mask"] = block_diagonal_mask(one_row if ids is None else ids)
        if side and self.with_sequence_ids:
            sample["sequence_ids"] = torch.full_like(sample["tokens"], index) if ids is None else ids
        return sample

    def _boundaries(self, cu_seqlens) -> dict[str, torch.Tensor]:
        bounds = torch.from_numpy(cu_seqlens)
        longest = (bounds[1:] - bounds[:-1]).max()
        if self._pad_boundaries:
            bounds = torch.nn.functional.pad(bounds, (0, self.args.seq_length + 1 - len(bounds)), value=int(bounds[-1]))
        return {"cu_seqlens": bounds, "max_seqlen": longest}


class Samples(torch.utils.data.Dataset):
    """A row of ``count`` samples: epoch after epoch, shuffled; or, if seed is None, each once, then masked ones."""

    def __init__(
        self, data: PreparedBatches, dataset: PreparedDataset, count: int, seed: int | None, side: bool
    ) -> None:
        self._data, self._dataset, self._count, self._seed, self._side = data, dataset, count, seed, side
        self._order = functools.lru_cache(maxsize=2)(epoch_order)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _order=functools.lru_cache(maxsize=2)(epoch_order))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        size = len(self._dataset)
        if self._seed is not None:
            epoch, place = divmod(int(position), size)
            return self._data.form(self._dataset, int(self._order(size, self._seed, epoch)[place]), self._side)
        sample = self._data.form(self._dataset, int(position) if position < size else 0, self._side)
        if position >= size:
            sample["loss_mask"].zero_()
        return sample


class Layout:
    """How the rows of a sample are kept apart: ``thd``, or else an attention mask, or one row a sample."""

    def __init__(self, packed: bool, thd: bool) -> None:
        self.packed, self.thd = packed, thd

    @property
    def text(self) -> str:
        """For the log."""
        rows = "packed" if self.packed else "one row each"
        return f"{rows}, {'THD' if self.thd else 'kept apart by an attention mask' if self.packed else 'padded'}"


def choose_layout(args: argparse.Namespace, has_packing: bool, version: tuple[int, int]) -> Layout:
    """What ``--sft-packing`` and Megatron's own flags amount to.

    Attention must never look from one row of a pack into another. Transformer Engine's causal attention ignores an
    attention mask, so there only THD batches keep rows apart: those that Megatron-LM makes under ``--sft``, from 0.17
    on (0.16 hands their boundaries on in a shape that attention cannot read). megatron-core's local attention is the
    reverse: it takes a mask, and refuses THD.

    Raises:
        ValueError: flags under which rows would not be kept apart, or that this release cannot do.
    """
    hybrid = any(getattr(args, name, None) for name in ("hybrid_layer_pattern", "hybrid_override_pattern"))
    # A HybridModel's layers are Transformer Engine's, whatever --transformer-impl says.
    choice, sft, local = args.sft_packing, getattr(args, "sft", False), args.transformer_impl == "local" and not hybrid
    if choice == "auto":
        choice = "thd" if sft else "none" if not has_packing else "mask" if local else "thd"
    if sft and choice != "thd" and not (choice == "none" and not local and version >= READS_PACKED_BOUNDARIES):
        raise ValueError(f"--sft-packing {choice} does not go with --sft: remove --sft")
    if choice == "thd" or sft:
        _check_thd(args, sft, local, version)
        return Layout(packed=choice == "thd" and has_packing, thd=True)
    if choice == "mask":
        if not local:
            raise ValueError(
                "--sft-packing mask needs --transformer-impl local (and no HybridModel): Transformer Engine's causal "
                "attention ignores the mask and would look across the rows of a pack"
            )
        if not args.create_attention_mask_in_dataloader:
            raise ValueError("--sft-packing mask: remove --no-create-attention-mask-in-dataloader")
        return Layout(packed=True, thd=False)
    return Layout(packed=False, thd=False)


def _refuse_what_is_not_ours(args: argparse.Namespace) -> None:
    if args.dataloader_type != "single":
        raise ValueError(f"--dataloader-type {args.dataloader_type}: --sft-data shuffles itself: remove it")
    if getattr(args, "eval_micro_batch_size", None) not in (None, args.micro_batch_size):
        raise ValueError("--eval-micro-batch-size does not go with --sft-data: remove it")
    for name, text in (
        ("full_validation", "each set is evaluated whole, or for --eval-iters batches if that is less"),
        ("multiple_validation_sets", "each --sft-eval-data set is evaluated under its name as it is"),
        ("hybrid_context_parallel", "it needs samples of Megatron's own making"),
        ("dataloader_inter_document_masking", "--sft keeps the rows of a pack apart"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --sft-data ({text}): remove it")


def _check_thd(args: argparse.Namespace, sft: bool, local: bool, version: tuple[int, int]) -> None:
    ways_out = "give --sft-packing none (one row a sample)"
    if version < READS_PACKED_BOUNDARIES:
        raise ValueError(f"packed data needs --sft of Megatron-LM 0.17 or later with Transformer Engine; or {ways_out}")
    if local:
        raise ValueError("--sft makes THD batches, which --transformer-impl local refuses: remove --sft")
    if not sft:
        raise ValueError(
            "packed data with Transformer Engine needs --sft and --no-create-attention-mask-in-dataloader, so that "
            f"Megatron keeps the rows of a pack apart; or {ways_out}"
        )
    if args.create_attention_mask_in_dataloader:
        raise ValueError("--sft with --sft-data: give --no-create-attention-mask-in-dataloader too")
    if args.micro_batch_size != 1 and version < SEVERAL_PACKS_IN_A_MICRO_BATCH:
        raise ValueError(f"--sft packs within one sample: --micro-batch-size must be 1, not {args.micro_batch_size}")
    if version < PACKED_BOUNDARIES_ON_EVERY_STAGE and args.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} with --sft: Megatron-LM before 0.18 "
            f"does not tell every rank where the rows of a pack end; use a later release, or {ways_out}"
        )
    if version < PACKED_BOUNDARIES_ON_EVERY_STAGE and args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size} with packed data needs Megatron-LM 0.18 or later"
        )
