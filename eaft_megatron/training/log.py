"""Where the numbers go: metrics.jsonl, TensorBoard, and the terminal. Rank 0 only."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from eaft_megatron.files import write_text


class RunLog:
    """One per process; on ranks other than 0 every method does nothing."""

    def __init__(self, args: argparse.Namespace, start_iteration: int) -> None:
        self._bar = self._file = self._board = None
        if dist.get_rank() != 0:
            return
        if args.run_dir:
            self._file = _open_metrics(Path(args.run_dir) / "metrics.jsonl", start_iteration)
        folder = args.tensorboard_dir or (args.run_dir and str(Path(args.run_dir) / "tensorboard"))
        if folder and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder, purge_step=start_iteration + 1)
        elif args.tensorboard_dir:
            raise ValueError("--tensorboard-dir: tensorboard is not installed (pip install tensorboard)")
        self._bar = tqdm(
            total=args.train_iters, initial=start_iteration, desc=args.loss_type, unit="it", file=sys.stderr
        )

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def training(self, iteration: int, metrics: dict[str, Any], seconds: float, show: bool) -> None:
        """A finished step: to the files always, to the terminal when ``show``."""
        self._record(iteration, metrics | {"step time": seconds}, {}, "")
        if self._bar is not None:
            self._bar.update()
            if show:
                self.say(
                    f"iteration {iteration:5d} | lm loss {metrics['lm loss']:.6f} | eaft loss "
                    f"{metrics['eaft loss']:.6f} | weight {metrics['eaft weight']:.3f} | entropy "
                    f"{metrics['eaft entropy']:.3f} | conflicts {metrics['eaft conflict rate']:.3%} | grad norm "
                    f"{metrics['grad norm']:.3f} | lr {metrics['learning rate']:.2e} | {seconds:.1f} s"
                )

    def evaluation(self, iteration: int, name: str, metrics: dict[str, Any]) -> None:
        """A finished evaluation of the set ``name``."""
        self._record(iteration, metrics, {"eval": name}, f"{name} ")
        self.say(
            f"iteration {iteration:5d} | {name}: lm loss {metrics['lm loss']:.6f} | weight "
            f"{metrics['eaft weight']:.3f} | entropy {metrics['eaft entropy']:.3f} | conflicts "
            f"{metrics['eaft conflict rate']:.3%} | {metrics['tokens']:.0f} tokens"
        )

    def close(self) -> None:
        """Flush everything."""
        for sink in (self._bar, self._file, self._board):
            if sink is not None:
                sink.close()

    def _record(self, iteration: int, metrics: dict[str, Any], extra: dict[str, Any], prefix: str) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"iteration": iteration, **extra, **metrics}) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(f"{prefix}{key}", value, iteration)


def _open_metrics(path: Path, start_iteration: int):
    """Append to the run's metrics; rows after the iteration we resume from are dropped, for they are made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not start_iteration:
        os.replace(path, path.with_name("metrics.previous.jsonl"))  # another run's, kept once
    elif path.exists():
        write_text(path, "".join(_rows_up_to(path, start_iteration)))
    return path.open("a")


def _rows_up_to(path: Path, iteration: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut off
        if row["iteration"] <= iteration:
            kept.append(line + "\n")
    return kept
