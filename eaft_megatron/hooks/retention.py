"""``--save-keep-last N``: a Megatron-LM run keeps its newest checkpoints, and deletes the others as it goes."""

from __future__ import annotations

import argparse
import functools
import threading
from typing import Any

from eaft_megatron.checkpoint_files import drop_old


def keep_last_checkpoints(args: argparse.Namespace) -> None:
    """Have Megatron's training loop delete old checkpoints of ``--save`` after each save, in a thread of rank 0.

    Raises:
        ValueError: the number is < 1, there is no ``--save``, or ``--save-retain-interval`` deletes as well.
    """
    from eaft_megatron.megatron_map import training

    keep = getattr(args, "save_keep_last", None)
    if keep is None:
        return
    if keep < 1:
        raise ValueError(f"--save-keep-last must be >= 1, got {keep}")
    if not getattr(args, "save", None):
        raise ValueError("--save-keep-last without --save: say where the checkpoints go, or remove it")
    if getattr(args, "save_retain_interval", None) is not None:
        raise ValueError("--save-keep-last and --save-retain-interval both delete checkpoints: remove one of them")
    original = training.save_checkpoint
    if hasattr(original, "_keeps_last"):
        return

    @functools.wraps(original)
    def saving(*rest: Any, **kwargs: Any):
        result = original(*rest, **kwargs)
        if getattr(args, "rank", 0) == 0:  # the tracker, not the call, says what is safely there: a save may be async
            threading.Thread(target=_drop, args=(args.save, keep)).start()
        return result

    saving._keeps_last = True  # type: ignore[attr-defined]
    training.save_checkpoint = saving


def _drop(folder: str, keep: int) -> None:
    try:
        dropped = drop_old(folder, keep)
    except OSError as error:
        print(f"--save-keep-last: {error}", flush=True)
        return
    if dropped:
        print(
            f"--save-keep-last {keep}: deleted the checkpoint(s) of iteration {', '.join(map(str, dropped))}",
            flush=True,
        )
