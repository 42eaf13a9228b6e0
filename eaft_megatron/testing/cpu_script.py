"""Stand-ins with which an untouched Megatron-LM training script runs on CPU. For ``run --device cpu`` only."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import torch

from eaft_megatron.megatron_map import SYMBOLS, has
from eaft_megatron.testing.cpu import _Patcher, cpu_standins

_FLAGS = {"--distributed-backend": "gloo"}
_EXPLAINED = "--device cpu: {flag} {value} needs a GPU: remove it, or give {flag} {ours}"


@contextlib.contextmanager
def script_standins() -> Iterator[None]:
    """:func:`cpu_standins`, and what ``megatron.training`` does at start beside them. ``sys.argv`` gains gloo.

    Raises:
        RuntimeError: CUDA is available.
        ValueError: a flag asks for another backend than gloo.
    """
    _choose_gloo()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the checkpoint writers' processes have no stand-ins
    with cpu_standins(), contextlib.ExitStack() as stack:
        patch = _Patcher(stack)
        _stand_in_for_start(patch)
        # It warns in every layer that the CPU's generator moved with the "CUDA" one, which is the CPU's here.
        logging.getLogger(SYMBOLS["rng_tracker"].module).setLevel(logging.ERROR)
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # gloo may abort in a group still alive at exit


def _choose_gloo() -> None:
    for flag, ours in _FLAGS.items():
        words = " ".join(sys.argv).replace(f"{flag}=", f"{flag} ").split()
        if flag not in words:
            sys.argv += [flag, ours]
        elif (value := words[words.index(flag) + 1 :][:1]) != [ours]:
            raise ValueError(_EXPLAINED.format(flag=flag, value=" ".join(value), ours=ours))


def _stand_in_for_start(patch: _Patcher) -> None:
    from eaft_megatron.megatron_map import dataset_utils, initialize, training

    without_cuda = _without_cuda(initialize.initialize_megatron)
    for module in (initialize, training):  # the second imported the function under its name
        patch(module, initialize_megatron=without_cuda)
    if has("initialize.fused_kernels"):
        patch(initialize.fused_kernels, load=lambda args: None)
    patch(dataset_utils, compile_helpers=_compile_helpers)


def _without_cuda(initialize_megatron: Callable) -> Callable:
    """Its own switch for machines without CUDA, which its training loop does not set."""

    @functools.wraps(initialize_megatron)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        return initialize_megatron(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize


def _compile_helpers() -> None:
    """Megatron's dataset helpers, unless they are there (a wheel has them, and no Makefile to make them with).

    Its Makefile asks whatever python3 and python3-config come first on PATH, which need not be this interpreter's.
    """
    from eaft_megatron.megatron_map import megatron_datasets

    try:
        has_helpers = has("helpers_cpp")
    except ImportError:  # built for another interpreter
        has_helpers = False
    if not has_helpers:
        import pybind11

        includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = os.path.dirname(megatron_datasets.__file__)
        subprocess.run(["make", "-C", folder, f"CPPFLAGS={includes}", f"LIBEXT={suffix}"], check=True)
