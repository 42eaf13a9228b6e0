"""The loss hook: what megatron-core calls to turn logits into a loss.

``LanguageModule.compute_language_model_loss(labels [b, s], logits [s, b, V/tp]) -> [b, s]`` is the one method that
every megatron-core release and every language model calls. It sees neither the loss mask nor packing, so a thin
wrapper around the caller (``_postprocess``) notes those by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaft_megatron import megatron_map
from eaft_megatron.hooks.deferred_logits import DeferredLogits, deferring, linear_options
from eaft_megatron.hooks.model_checks import check_model
from eaft_megatron.hooks.settings import LossSettings
from eaft_megatron.loss.gate import Gate
from eaft_megatron.loss.gates import SFTGate
from eaft_megatron.loss.linear import vocab_parallel_linear_token_loss
from eaft_megatron.loss.token_stats import TokenStats
from eaft_megatron.loss.vocab_parallel import vocab_parallel_token_loss
from eaft_megatron.megatron_map import language_models, loss_caller

_METHOD = "compute_language_model_loss"
_NOTED = ("labels", "loss_mask", "packed_seq_params")
_IGNORE_INDEX = -100


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the hook saw of one micro-batch: detached, each tensor ``[b, s]``. ``loss`` is what the gate made of it."""

    loss: Tensor
    stats: TokenStats


@dataclasses.dataclass
class LossHook:
    """An installed hook.

    Attributes:
        settings: as given to :func:`install`.
        own_gate: a gate of the user's own, as given to :func:`install`; takes the place of what ``settings`` say.
        latest: what was seen of the newest micro-batch. It is left in place when read, since a replayed CUDA graph
            fills the same tensors without running any Python.
        calls: how often the hook computed a loss.
        replayed: whether CUDA graphs may run the hook's work without calling it.
        check_finite: whether the metrics' loss function must look for NaN and inf, since the host does not.
        side: columns for gates that need more than logits ("ref_logprob", "sample_weight"), each ``[b, s]``, and
            "sequence_ids", int64, where samples are packed (-1: padding); a host that has them sets them before each
            forward pass, which takes them out.
    """

    settings: LossSettings
    own_gate: Gate | None = None
    latest: Observation | None = None
    calls: int = 0
    replayed: bool = False
    check_finite: bool = False
    side: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    _noted: dict[str, Any] | None = None
    _undo: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    @property
    def gate(self) -> Gate:
        """What turns a token's statistics into its loss."""
        return self.settings.gate() if self.own_gate is None else self.own_gate

    @property
    def name(self) -> str:
        """The method, as messages name it."""
        return f"--loss-type {self.settings.loss_type}" if self.own_gate is None else f"gate {self.own_gate!r}"

    def compute(
        self, model: torch.nn.Module, labels: Tensor, logits: Tensor | DeferredLogits, original: Callable
    ) -> Tensor:
        """The hooked method: per-token loss ``[b, s]`` from labels ``[b, s]`` and logits ``[s, b, V/tp]``.

        Training: the gate's loss. Evaluation (``model.eval()``): the plain cross entropy over the true vocabulary.
        """
        if self._noted is None:
            raise ValueError(
                f"{self.name} trains GPTModel, MambaModel and HybridModel: "
                f"{type(model).__name__} came to its loss without passing through theirs, so its loss mask is not "
                "known here. Call vocab_parallel_eaft_loss in its own loss instead"
            )
        heads = getattr(model.config, "mtp_num_layers", None)
        if heads and labels is not self._noted["labels"]:
            # A multi-token-prediction head: rolled labels, plain cross entropy.
            return original(model, labels, logits.materialize() if isinstance(logits, DeferredLogits) else logits)
        loss_mask = self._noted["loss_mask"]
        target = _masked_target(labels, loss_mask)
        gate = self.gate
        if gate.needs_batch and loss_mask is None:
            raise ValueError(
                f"{self.name} with these options takes statistics over the tokens that count, "
                f"and this script does not pass loss_mask to {type(model).__name__}: pass it, or use a loss without "
                "percentile, median or mean of a sequence"
            )
        side, self.side = dict(self.side), {}  # a host that forgets to set them must not get the last micro-batch's
        sequence_ids = side.pop("sequence_ids", None)
        if not model.training and not set(gate.needs_side) <= set(side):
            gate = SFTGate()  # what evaluation returns is the plain cross entropy in any case
        if gate.needs_sequence_ids:
            if sequence_ids is None:
                sequence_ids = _sequence_ids(labels, self._noted["packed_seq_params"], self.name)
            sequence_ids = sequence_ids.transpose(0, 1)
        else:
            sequence_ids = None
        loss, stats = self._token_loss(
            logits,
            target.transpose(0, 1).contiguous(),
            gate,
            group=_tensor_parallel_group(model),
            side={name: column.transpose(0, 1) for name, column in side.items()},
            sequence_ids=sequence_ids,
            reduce_group=_data_parallel_group(model) if gate.needs_batch else None,
            topk=self.settings.topk,
            vocab_size=self.settings.true_vocab_size,
            ignore_index=_IGNORE_INDEX,
        )
        self.latest = Observation(
            loss.detach().transpose(0, 1).clone(),  # the host may reduce its loss in place
            dataclasses.replace(
                stats,
                **{
                    field: value.transpose(0, 1)
                    for field in ("ce", "entropy", "weight", "valid")
                    if (value := getattr(stats, field)) is not None
                },
            ),
        )
        self.calls += 1
        self.replayed = _has_cuda_graphs(model.config)
        if model.training:
            return loss.transpose(0, 1).contiguous()
        # A copy: the host may reduce what it gets in place, and this one is kept for the metrics.
        return stats.ce.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def _token_loss(
        self, logits: Tensor | DeferredLogits, target: Tensor, gate: Gate, **options: Any
    ) -> tuple[Tensor, TokenStats]:
        if self.settings.linear_chunk is None:
            assert isinstance(logits, Tensor), "nothing defers logits without --eaft-linear-chunk"
            return vocab_parallel_token_loss(logits, target, gate, inplace_backward=True, return_stats=True, **options)
        if not isinstance(logits, DeferredLogits):
            raise ValueError(
                "--eaft-linear-chunk: this model did not hand the output of its output layer to its loss as it is, so "
                "its logits are whole already: remove the flag"
            )
        return vocab_parallel_linear_token_loss(
            logits.hidden,
            logits.weight,
            target,
            gate,
            chunk_tokens=self.settings.linear_chunk,
            drop_ignored=True if self.settings.linear_drop_ignored else None,
            return_stats=True,
            **linear_options(logits),
            **options,
        )

    def remove(self) -> None:
        """Put Megatron's own methods back."""
        while self._undo:
            self._undo.pop()()


_installed: LossHook | None = None


def installed() -> LossHook | None:
    """The hook in force, or None."""
    return _installed


def install(settings: LossSettings | None = None, *, gate: Gate | None = None) -> LossHook:
    """Make every GPTModel, MambaModel and HybridModel of this process compute its loss as ``settings`` say.

    Args:
        settings: default: EAFT as the paper has it.
        gate: one of your own, which takes the place of a method; of ``settings`` K, the true vocabulary and the
            linear loss count then. Side columns, statistics and metrics are as for ours.

    Models need not be built yet. The hook follows the host's ``loss_mask`` where the model is given one: a token
    whose mask is 0 is ignored before anything else is computed from it. ``"sft"`` is the plain cross entropy over the
    true vocabulary; Megatron's own, which counts the padded columns too, is what runs when nothing is installed.

    Raises:
        ValueError: a hook is installed already, or this megatron-core's loss method is not the one we know, or a
            subclass overrides it (its losses would silently not be ours); or ``gate`` is no :class:`Gate`, or cannot
            work with ``settings``.
    """
    global _installed
    from eaft_megatron.megatron_map import LanguageModule

    if _installed is not None:
        raise ValueError("the EAFT loss hook is installed already; call eaft_megatron.hooks.uninstall() first")
    _check_signature(LanguageModule)
    _check_overrides(LanguageModule)
    settings = LossSettings() if settings is None else settings
    if gate is not None:
        check_own_gate(gate, settings)
    hook = LossHook(settings, gate)
    original = getattr(LanguageModule, _METHOD)

    @functools.wraps(original)
    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        return hook.compute(self, labels, logits, original)

    try:
        rebind(hook, LanguageModule, _METHOD, compute_language_model_loss)
        for model in language_models():
            _note_arguments(hook, model, loss_caller(model))
    except BaseException:
        hook.remove()
        raise
    _installed = hook
    return hook


def check_own_gate(gate: Gate, settings: LossSettings) -> None:
    """``ValueError`` if this is no gate, does not work with this K, or ``settings`` hold options of another method."""
    if not isinstance(gate, Gate):
        raise ValueError(f"gate must be an instance of eaft_megatron.loss.gates.Gate, got {gate!r}")
    if settings.options or settings.eaft_gate != "linear":
        raise ValueError(f"{settings!r} holds options of a method, whose place gate {gate!r} takes: remove one of them")
    gate.check(min(settings.topk, settings.true_vocab_size or settings.topk))


def uninstall() -> None:
    """Put Megatron's own methods back; does nothing when no hook is installed."""
    global _installed
    if _installed is not None:
        _installed.remove()
        _installed = None


def rebind(hook: LossHook, owner: Any, name: str, replacement: Callable) -> None:
    """Set ``owner.name`` (a class's or a module's) until the hook is removed."""
    original = owner.__dict__[name]
    setattr(owner, name, replacement)
    hook._undo.append(lambda: setattr(owner, name, original))
    assert getattr(owner, name) is replacement


def _note_arguments(hook: LossHook, owner: type, name: str) -> None:
    """Wrap ``owner.name`` so that the hook knows the labels, loss mask and packing of the call it serves."""
    original = owner.__dict__[name]
    signature = inspect.signature(original)
    if "labels" not in signature.parameters:
        raise ValueError(f"{owner.__name__}.{name} of this megatron-core takes no labels: unknown version")

    @functools.wraps(original)
    def noting(self, *args, **kwargs):
        if getattr(type(self), _METHOD) is not getattr(megatron_map.LanguageModule, _METHOD) or _METHOD in vars(self):
            raise ValueError(
                f"{type(self).__name__} overrides {_METHOD}: its loss would not be that of {hook.name}. "
                "Remove the override, or call vocab_parallel_eaft_loss in it"
            )
        arguments = signature.bind(self, *args, **kwargs).arguments
        if arguments.get("output_processor") is not None:
            raise ValueError(
                f"output_processor takes the loss of {type(self).__name__} into its own hands, where {hook.name} "
                "cannot reach it: remove it, or call vocab_parallel_eaft_loss in it"
            )
        if arguments.get("labels") is not None:
            check_model(self, arguments, hook.name)
        outer, hook._noted = hook._noted, {key: arguments.get(key) for key in _NOTED}
        defers = hook.settings.linear_chunk is not None and arguments.get("labels") is not None
        try:
            with deferring(self) if defers else contextlib.nullcontext():
                return original(self, *args, **kwargs)
        finally:
            hook._noted = outer

    rebind(hook, owner, name, noting)


def _check_signature(owner: type) -> None:
    parameters = list(inspect.signature(getattr(owner, _METHOD)).parameters)
    if parameters != ["self", "labels", "logits"]:
        raise ValueError(
            f"{owner.__name__}.{_METHOD} of this megatron-core takes ({', '.join(parameters)}), not (self, labels, "
            "logits): unknown version; call vocab_parallel_eaft_loss yourself, or install a supported megatron-core"
        )


def _check_overrides(owner: type) -> None:
    subclass: type
    for subclass in owner.__subclasses__():
        if _METHOD in vars(subclass):
            raise ValueError(
                f"{subclass.__module__}.{subclass.__qualname__} overrides {_METHOD}, so the hook would never be "
                "called for it. Remove the override, or call vocab_parallel_eaft_loss in it"
            )
        _check_overrides(subclass)


def _masked_target(labels: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Labels ``[b, s]`` with ignore_index wherever the host's loss mask is 0."""
    if loss_mask is None:
        return labels
    if loss_mask.numel() != labels.numel():
        raise ValueError(f"loss_mask {tuple(loss_mask.shape)} and labels {tuple(labels.shape)} differ in size")
    return labels.masked_fill(loss_mask.reshape(labels.shape) == 0, _IGNORE_INDEX)


def _sequence_ids(labels: Tensor, packed_seq_params: Any, name: str) -> Tensor:
    """``[b, s]`` int64: which sequence each token belongs to, numbered apart on every data-parallel rank.

    Context-parallel ranks hold parts of the same sequences and number them alike.
    """
    from eaft_megatron.megatron_map import parallel_state

    if packed_seq_params is not None:
        raise ValueError(
            f"{name} takes statistics over sequences, and packed sequences are not told apart in this release: do not "
            "pack, or give --talr-tau (talr), --iw-sft-level token (iw-sft)"
        )
    rows = torch.arange(labels.shape[0], device=labels.device).unsqueeze(1).expand(labels.shape)
    return rows + labels.shape[0] * parallel_state.get_data_parallel_rank()


def _has_cuda_graphs(config: Any) -> bool:
    return bool(getattr(config, "enable_cuda_graph", False)) or getattr(config, "cuda_graph_impl", "none") != "none"


def _data_parallel_group(model: torch.nn.Module):
    """Data x context parallel, the scope of batch statistics."""
    collection = getattr(model, "pg_collection", None)
    # Where weights are spread over a further axis (0.19 on), its ranks hold other data too.
    for name in ("dp_cp_gtp_remat", "dp_cp"):
        group = getattr(collection, name, None)
        if group is not None:
            return group
    from eaft_megatron.megatron_map import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _tensor_parallel_group(model: torch.nn.Module):
    """The model's own tensor-parallel group: a fork may run several models on different ones."""
    collection = getattr(model, "pg_collection", None)
    if collection is not None and getattr(collection, "tp", None) is not None:
        return collection.tp
    from eaft_megatron.megatron_map import parallel_state

    return parallel_state.get_tensor_model_parallel_group()
