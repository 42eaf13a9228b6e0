"""Put two training runs side by side: a table on the terminal and a picture.

    python examples/demo/comparison.py --sft RUN_DIR --eaft RUN_DIR --output DIR

Reads the metrics.jsonl of each run folder: rows of training iterations, and rows of the evaluation sets "target"
and "general" at the first and the last iteration. It shows what was measured and draws no conclusion.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_megatron.data.sources import open_sources, parse
from eaft_megatron.files import replacing

LOSS = "lm loss"
EVAL_SETS = ("target", "general")
STATISTICS = {"eaft weight": "weight", "eaft entropy": "entropy (nats)", "eaft conflict rate": "conflict rate"}
COLOURS = {"sft": "#4477aa", "eaft": "#cc6677"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """`train`: rows of training iterations in order. `before`, `after`: the evaluation rows by set name."""

    method: str
    train: list[Row]
    before: dict[str, Row]
    after: dict[str, Row]

    def change(self, name: str) -> float:
        return self.after[name][LOSS] - self.before[name][LOSS]

    def mean(self, key: str) -> float | None:
        """Mean of a column over the training iterations; None where the run has no such column."""
        values = [row[key] for row in self.train if row.get(key) is not None]
        return sum(values) / len(values) if values else None


def read_run(method: str, folder: Path) -> Run:
    """The run in `folder`. A resumed run may have written an iteration twice: the later row counts.

    Raises:
        FileNotFoundError, ValueError: no metrics, or no evaluation of a set before and after training.
    """
    path = folder / "metrics.jsonl"
    train: dict[int, Row] = {}
    evals: dict[str, dict[int, Row]] = {name: {} for name in EVAL_SETS}
    for where, line in open_sources([str(path)])[0].rows():
        row = parse(line, where)
        if row is None:
            continue
        if "eval" not in row:
            train[row["iteration"]] = row
        elif row["eval"] in evals:
            evals[row["eval"]][row["iteration"]] = row
    if not train:
        raise ValueError(f"{path}: no training iteration")
    for name, rows in evals.items():
        if len(rows) < 2:
            raise ValueError(f"{path}: '{name}' was evaluated {len(rows)} times; before and after are needed")
    return Run(
        method,
        [train[iteration] for iteration in sorted(train)],
        {name: rows[min(rows)] for name, rows in evals.items()},
        {name: rows[max(rows)] for name, rows in evals.items()},
    )


def table(runs: list[Run]) -> str:
    """Losses before and after each method, and means over its training iterations, as aligned text."""
    header = ["method"]
    for name in EVAL_SETS:
        header += [f"{name} before", "after", "change"]
    header += ["mean weight", "entropy", "conflict rate"]
    lines = [header]
    for run in runs:
        cells = [run.method]
        for name in EVAL_SETS:
            cells += [f"{run.before[name][LOSS]:.4f}", f"{run.after[name][LOSS]:.4f}", f"{run.change(name):+.4f}"]
        cells += ["-" if run.mean(key) is None else f"{run.mean(key):.4f}" for key in STATISTICS]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw(runs: list[Run], path: Path) -> None:
    """Three panels: training loss; losses before and after; weight, entropy and conflict rate during training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)
    _draw_training(left.subplots(), runs)
    _draw_before_after(middle.subplots(1, len(EVAL_SETS)), runs)
    _draw_statistics(right.subplots(len(STATISTICS), 1, sharex=True), runs)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130)
    plt.close(figure)


def _curve(axes: Any, run: Run, key: str) -> None:
    points = [(row["iteration"], row[key]) for row in run.train if row.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=COLOURS[run.method], alpha=0.25, linewidth=0.8)
        axes.plot(x, _smooth(y), color=COLOURS[run.method], linewidth=2, label=run.method)


def _smooth(values: tuple[float, ...], window: int = 9) -> list[float]:
    """Centred mean over up to `window` points, fewer at the ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _draw_training(axes: Any, runs: list[Run]) -> None:
    for run in runs:
        _curve(axes, run, LOSS)
    axes.set(title="Training batches (pale: raw)", xlabel="iteration", ylabel="plain cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_before_after(panels: Any, runs: list[Run]) -> None:
    labels = ["before", *[f"after {run.method}" for run in runs]]
    titles = {"target": "Held-out target chats", "general": "General text"}
    for axes, name in zip(panels, EVAL_SETS, strict=True):
        before = [run.before[name][LOSS] for run in runs]
        values = [sum(before) / len(before), *[run.after[name][LOSS] for run in runs]]
        bars = axes.bar(labels, values, color=["#999999", *[COLOURS[run.method] for run in runs]])
        axes.bar_label(bars, fmt="%.3f", padding=2)
        axes.set(title=titles[name], ylabel="plain cross entropy (nats per token)")
        axes.set_ylim(0, 1.12 * max(values))
        axes.tick_params(axis="x", rotation=30)


def _draw_statistics(panels: Any, runs: list[Run]) -> None:
    for axes, (key, label) in zip(panels, STATISTICS.items(), strict=True):
        for run in runs:
            _curve(axes, run, key)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if not axes.has_data():
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
    panels[0].set_title("Means over the trained tokens of a batch")
    panels[-1].set_xlabel("iteration")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(loc="center right")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare an SFT run with an EAFT run.")
    parser.add_argument("--sft", type=Path, required=True, metavar="RUN_DIR")
    parser.add_argument("--eaft", type=Path, required=True, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for demo.png")
    options = parser.parse_args(argv)
    try:
        runs = [read_run("sft", options.sft), read_run("eaft", options.eaft)]
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print("Cross entropy in nats per token; weight, entropy and conflict rate are means over the training iterations.")
    print(table(runs))
    for name in EVAL_SETS:
        if abs(runs[0].before[name][LOSS] - runs[1].before[name][LOSS]) > 1e-3:
            print(f"note: '{name}' differs before training: the runs did not start alike (model, data or precision)")
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "demo.png"
    draw(runs, picture)
    print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
