"""Logits that the output layer does not compute: what ``--eaft-linear-chunk`` puts between it and the loss.

While a GPTModel, MambaModel or HybridModel makes its loss, its output layer returns :class:`DeferredLogits`, hidden
states and weight. The model passes them on, scaled where MuP asks for it, to its loss method, which is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_COMPUTING = ("forward", "_forward_impl")  # the methods of an output layer that make logits


class DeferredLogits:
    """Stands for ``scale * hidden @ weight.T``, ``[s, b, V/tp]``.

    Whatever treats it as a tensor (a multi-token-prediction head with its own loss, a metric) gets the logits
    themselves, made by the output layer's own code, once. They are a copy: to change them in place is an error.

    Attributes:
        layer: the output layer.
        hidden: what it was given: ``[s, b, H]``, with sequence parallelism ``[s/tp, b, H]``.
        weight: ``[V/tp, H]``, its own or the embedding's.
        scale: factor of the logits.
    """

    def __init__(
        self, layer: torch.nn.Module, hidden: Tensor, weight: Tensor, compute: Callable[[], Tensor], scale: float = 1.0
    ) -> None:
        self.layer, self.hidden, self.weight, self.scale = layer, hidden, weight, scale
        self._compute = compute
        self._whole: Tensor | None = None
        self._differentiable = False

    def materialize(self) -> Tensor:
        """The logits; differentiable where gradients are on, whoever looked at them before."""
        if self._whole is None or torch.is_grad_enabled() > self._differentiable:
            logits = self._compute()
            self._whole = logits if self.scale == 1 else logits * self.scale
            self._differentiable = torch.is_grad_enabled()
        return self._whole

    def __mul__(self, factor: Any) -> DeferredLogits | Tensor:
        if isinstance(factor, (int, float)):
            return DeferredLogits(self.layer, self.hidden, self.weight, self._compute, self.scale * factor)
        return self.materialize() * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits | Tensor:
        return self * (1 / divisor) if isinstance(divisor, (int, float)) else self.materialize() / divisor

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize()[index]

    def __add__(self, other: Any) -> Tensor:
        return self.materialize() + other

    def __sub__(self, other: Any) -> Tensor:
        return self.materialize() - other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise ValueError(
                f"--eaft-linear-chunk: something changes the logits in place ({name}) before the loss is made of them, "
                "which would see nothing of it: remove the flag"
            )
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def tensor(value: Any) -> Any:
            return value.materialize() if isinstance(value, DeferredLogits) else value

        return function(
            *(tensor(value) for value in args), **{name: tensor(value) for name, value in (kwargs or {}).items()}
        )


@contextlib.contextmanager
def deferring(model: torch.nn.Module) -> Iterator[None]:
    """Within, the output layer of ``model`` (if this pipeline stage has one) returns :class:`DeferredLogits`.

    Its forward alone is replaced, so that hooks on it still run: Megatron's data-parallel wrapper waits in one for the
    weights it gathers.

    Raises:
        ValueError: an output layer whose product cannot be put off, and why.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        yield
        return
    _check_layer(layer, model.config)
    compute = layer.forward

    def forward(input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        if runtime_gather_output:
            return compute(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        used = layer.weight if weight is None else weight
        _check_weight(used)
        return DeferredLogits(layer, input_, used, lambda: compute(input_, weight=weight)[0]), None

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def linear_options(logits: DeferredLogits) -> dict[str, Any]:
    """Arguments of ``vocab_parallel_linear_token_loss`` that the output layer decides."""
    trained = logits.weight.requires_grad and torch.is_grad_enabled()
    return {
        "sequence_parallel": logits.layer.sequence_parallel,
        "gradient_accumulation_fusion": logits.layer.gradient_accumulation_fusion and trained,
        "logits_scale": logits.scale,
    }


def _check_layer(layer: Any, config: Any) -> None:
    from eaft_megatron.megatron_map import ColumnParallelLinear

    layer_class = type(layer)
    same = all(getattr(layer_class, name, None) is getattr(ColumnParallelLinear, name, None) for name in _COMPUTING)
    if not issubclass(layer_class, ColumnParallelLinear) or not same or "forward" in vars(layer):
        raise ValueError(
            "--eaft-linear-chunk takes the place of megatron-core's ColumnParallelLinear, and the output layer here, a "
            f"{layer_class.__name__}, computes in its own way (an adapter, another precision, a fused loss): remove "
            "the flag"
        )
    if layer.weight is not None:
        _check_weight(layer.weight)
    for applies, what in (
        (layer.bias is not None, "an output layer with a bias"),
        (layer.gather_output, "an output layer that gathers its logits (parallel_output=False)"),
        (getattr(layer, "disable_grad_reduce", False), "an output layer with disable_grad_reduce"),
        (getattr(layer, "output_dtype", None) not in (None, config.params_dtype), "--output-logit-dtype"),
        (getattr(layer, "gtp_remat_size", 1) > 1, "an output layer whose weight is spread over a further group"),
        (getattr(config, "defer_embedding_wgrad_compute", False), "--defer-embedding-wgrad-compute"),
        (getattr(config, "config_logger_dir", ""), "--config-logger-dir, which writes whole logits"),
    ):
        if applies:
            raise ValueError(f"--eaft-linear-chunk cannot serve {what}: remove one of them")


def _check_weight(weight: Tensor) -> None:
    sharded = hasattr(weight, "__fsdp_param__") or getattr(weight, "is_torch_fsdp2_param", False)
    if sharded or type(weight) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"--eaft-linear-chunk needs the output layer's weight as a plain tensor until the loss is there, and got a "
            f"{type(weight).__name__} that is sharded (FSDP) or quantised: remove the flag"
        )
