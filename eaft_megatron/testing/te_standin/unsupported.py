"""What the stand-in refuses, and its answers to questions about fp8, which it never uses."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor


def refuse(what: str) -> NoReturn:
    """The error for everything that would otherwise be computed wrongly, or not at all."""
    raise NotImplementedError(f"the Transformer Engine stand-in cannot do {what}")


def refusing(what: str) -> Callable[..., NoReturn]:
    """A function under a name that must exist, to be called by nobody."""

    def call(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(what)

    return call


def refuse_unless(allowed: dict[str, Any], given: dict[str, Any]) -> None:
    """Each option given must have the one value that the stand-in knows how to serve."""
    for name, value in given.items():
        if name not in allowed or value != allowed[name]:
            refuse(f"{name}={value!r}")


class Format(enum.Enum):
    """Number formats of fp8 recipes."""

    E4M3 = 1
    E5M2 = 2
    HYBRID = 3


class Recipe:
    """Base class of fp8 recipes; megatron-core asks objects whether they are one."""


class DelayedScaling(Recipe):
    """megatron-core derives a class of its own from it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse("fp8 recipes")


class QuantizedTensor(Tensor):
    """The type that no tensor here has."""


class RNGStatesTracker:
    """megatron-core derives a class of its own from it, for ``--te-rng-tracker``."""

    def __init__(self) -> None:
        refuse("--te-rng-tracker")


class FP8State:
    """``FP8GlobalStateManager`` of a run without fp8."""

    skip_fp8_weight_update_tensor = None

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    is_fp8_calibration = with_fp8_parameters = is_first_fp8_module = is_fp8_enabled

    @staticmethod
    def get_fp8_recipe() -> None: ...

    @staticmethod
    def reset() -> None: ...

    get_fp8_group = get_fp8_recipe

    @staticmethod
    def reduce_and_update_fp8_tensors(*args: Any, **kwargs: Any) -> None: ...

    set_skip_fp8_weight_update_tensor = reduce_and_update_fp8_tensors


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, **options: Any) -> Iterator[None]:
    """A region of fp8 that is switched off."""
    if enabled:
        refuse("fp8")
    yield


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    """Tells fp8 modules which pass runs; there are none."""
    yield
