"""``Linear``, ``LayerNormLinear`` and ``GroupedLinear``, sharded over the tensor-parallel group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaft_megatron.testing.te_standin import parallel
from eaft_megatron.testing.te_standin.base import Module, mark_sequence_parallel, mark_sharded
from eaft_megatron.testing.te_standin.norms import normalise
from eaft_megatron.testing.te_standin.unsupported import refuse, refuse_unless

_SPEED_OPTIONS = ("ub_", "name", "symmetric_ar_type", "save_original_input")  # of overlap: they change no number


class _Sharded(Module):
    """A linear layer ``[in, out]`` of which this rank holds its part of the output ("column") or input ("row")."""

    known_options: ClassVar[dict[str, Any]] = {"delay_wgrad_compute": False, "parameters_split": None}
    weight: nn.Parameter
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any],
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        **options: Any,
    ) -> None:
        super().__init__()
        refuse_unless(self.known_options, {k: v for k, v in options.items() if not k.startswith(_SPEED_OPTIONS)})
        if fuse_wgrad_accumulation:
            refuse("fused weight gradients: give --no-gradient-accumulation-fusion")
        if parallel_mode not in ("row", "column", None):
            raise ValueError(f"parallel_mode must be 'row', 'column' or None, got {parallel_mode!r}")
        self.fuse_wgrad_accumulation = self.save_original_input = False
        self.set_tensor_parallel_group(tp_group)
        self.tp_size = tp_size if tp_group is None else parallel.group_size(tp_group)
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.in_features = self._share(in_features, "row")
        self.out_features = self._share(out_features, "column")
        self._made = {"dtype": params_dtype, "device": device}
        self._init_method, self._tracker = init_method, get_rng_state_tracker
        self.rng_tracker_name = rng_tracker_name

    def _share(self, features: int, mode: str) -> int:
        if self.parallel_mode != mode:
            return features
        if features % self.tp_size:
            raise ValueError(f"{features} features of a {mode}-parallel layer do not divide over {self.tp_size} ranks")
        return features // self.tp_size

    def _add_weight(self, name: str = "weight") -> None:
        region: Any = contextlib.nullcontext()
        if self._tracker is not None:
            region = self._tracker().fork(*([self.rng_tracker_name] if self.rng_tracker_name else []))
        shape = (self.out_features, self.in_features)
        weight = self.add_parameter(name, shape, self._init_method, region=region, **self._made)
        mark_sharded(weight, 1 if self.parallel_mode == "row" else 0)

    def _add_bias(self) -> None:
        if not self.use_bias:
            self.register_buffer("bias", torch.empty(0, **self._made), persistent=False)
            return
        bias = self.add_parameter("bias", (self.out_features,), nn.init.zeros_, **self._made)
        if self.parallel_mode == "column":
            mark_sharded(bias, 0)
        elif self.parallel_mode == "row":
            mark_sequence_parallel(bias, self.sequence_parallel)

    def _project(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., in]`` to ``[..., out]``, the first dimension gathered or scattered under sequence parallelism."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype != x.dtype:
                raise TypeError(f"the input is {x.dtype}, {name} is {parameter.dtype}")
        bias = self.bias if self.use_bias and not self.return_bias else None
        if self.parallel_mode == "row" and self.tp_size > 1:
            collective = parallel.reduce_scatter if self.sequence_parallel else parallel.sum_over_ranks
            out = collective(F.linear(x, self.weight), self.tp_group)
            out = out if bias is None else out + bias
        else:
            if self.parallel_mode == "column" and self.tp_size > 1:
                gathers = parallel.gather_from_ranks if self.sequence_parallel else parallel.copy_to_ranks
                x = gathers(x, self.tp_group)
            out = F.linear(x, self.weight, bias)
        return (out, self.bias) if self.return_bias else out


class Linear(_Sharded):
    """``x @ weight.T + bias``."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self._add_weight()
        self._add_bias()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._project(inp)


class LayerNormLinear(_Sharded):
    """A norm, then a linear layer. ``return_layernorm_output`` may be set after construction, as LoRA does."""

    layer_norm_weight: nn.Parameter
    layer_norm_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        *,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        zero_centered_gamma: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization must be LayerNorm or RMSNorm, got {normalization!r}")
        self.normalization, self.eps, self.zero_centered_gamma = normalization, eps, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        self._add_norm()
        self._add_weight()
        self._add_bias()

    def _add_norm(self) -> None:
        self.register_parameter("layer_norm_bias", None)
        ones = nn.init.zeros_ if self.zero_centered_gamma else nn.init.ones_
        inits = {"layer_norm_weight": ones}
        if self.normalization == "LayerNorm":
            inits["layer_norm_bias"] = nn.init.zeros_
        for name, init in inits.items():
            parameter = self.add_parameter(name, (self.in_features,), init, **self._made)
            mark_sequence_parallel(parameter, self.sequence_parallel)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = normalise(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma)
        out = self._project(normed)
        if not self.return_layernorm_output:
            return out
        if self.sequence_parallel and self.return_layernorm_output_gathered:
            normed = parallel.gather_from_ranks(normed, self.tp_group)
        return (*out, normed) if self.return_bias else (out, normed)


class GroupedLinear(_Sharded):
    """``num_gemms`` linear layers side by side, each for its own run of rows: one expert each."""

    known_options: ClassVar[dict[str, Any]] = {
        "delay_wgrad_compute": False,
        "single_grouped_weight": False,
        "single_grouped_bias": False,
    }

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        if self.use_bias:
            refuse("experts with a bias")
        if self.tp_size > 1:  # megatron-core's token dispatcher communicates, and hides the group from the experts
            refuse("experts that communicate over tensor parallelism themselves")
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            self._add_weight(f"weight{index}")

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        if len(m_splits) != self.num_gemms:
            raise ValueError(f"{len(m_splits)} runs of rows for {self.num_gemms} experts")
        runs = torch.split(inp, [int(rows) for rows in m_splits])
        return torch.cat([F.linear(rows, getattr(self, f"weight{index}")) for index, rows in enumerate(runs)])
