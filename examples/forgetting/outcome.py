"""The table and the picture of an experiment's results.

    python examples/forgetting/outcome.py --results results.json --output DIR

Writes table.md and pareto.png. Every figure is a mean over seeds with the sample standard deviation behind it.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from eaft_megatron.files import replacing, write_text

COLOURS = {
    "sft": "#222222",
    "eaft": "#cc3311",
    "dft": "#0077bb",
    "talr": "#33bbee",
    "flow": "#009988",
    "sft-kl": "#ee7733",
}
TASKS = {"bfcl": "function calls (BFCL)", "gsm8k": "maths word problems (GSM8K)"}
DATA = {"clean": "clean answers", "conflict": "about half of the answers falsified"}

Run = dict[str, Any]


class Spread(NamedTuple):
    """Mean and sample standard deviation, None for a single value."""

    mean: float
    deviation: float | None


def spread(values: list[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


class Setting(NamedTuple):
    """One training set: its runs by method, in the order of seeds, and the untrained model's numbers."""

    task: str
    data: str
    base: Run
    methods: dict[str, list[Run]]

    def change(self, method: str, name: str) -> list[float]:
        """After minus before: the loss of "target" or "general", nats per token, a value a seed."""
        return [run[name]["loss"] - self.base[name]["loss"] for run in self.methods[method]]


def settings(results: dict[str, Any]) -> list[Setting]:
    """The training sets of a results.json.

    Raises:
        ValueError: a method with other seeds than its neighbours.
    """
    bases = {run["task"]: run for run in results["runs"] if run["method"] == "base"}
    found: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in results["runs"]:
        if run["method"] != "base":
            found.setdefault((run["task"], run["data"]), {}).setdefault(run["method"], []).append(run)
    for (task, data), methods in found.items():
        for method, runs in methods.items():
            if [run["seed"] for run in runs] != results["seeds"]:
                raise ValueError(f"{task}, {data}, {method}: the seeds are not {results['seeds']}")
    return [Setting(task, data, bases[task], methods) for (task, data), methods in found.items()]


def table(results: dict[str, Any]) -> str:
    """Markdown, a table for each training set."""
    lines = []
    for setting in settings(results):
        base = setting.base
        conflicts = results["conflicts"][f"{setting.task}_{setting.data}"]
        lines += [
            f"### {TASKS[setting.task]}: {DATA[setting.data]}",
            "",
            f"Training set, before training: loss {conflicts['loss']:.3f}, confident conflicts "
            f"{conflicts['conflict_share']:.2%} of the tokens with {conflicts['conflict_loss_share']:.1%} of the loss.",
            "",
            "| method | target loss | change | token accuracy | exact | general loss | change | against sft | weight |",
            "|---|---|---|---|---|---|---|---|---|",
            f"| (before) | {base['target']['loss']:.3f} | | {base['target']['accuracy']:.1%} | "
            f"{base['target']['exact']:.1%} | {base['general']['loss']:.4f} | | | |",
        ]
        for method, runs in setting.methods.items():
            general = setting.change(method, "general")
            target = {name: spread([run["target"][name] for run in runs]) for name in ("loss", "accuracy", "exact")}
            against = ""
            if method != "sft" and "sft" in setting.methods:
                paired = zip(general, setting.change("sft", "general"), strict=True)
                against = _signed(spread([own - sft for own, sft in paired]), 4)
            lines.append(
                f"| {method} | {target['loss'].mean:.3f} | {_signed(spread(setting.change(method, 'target')), 3)} | "
                f"{_percent(target['accuracy'])} | {_percent(target['exact'])} | "
                f"{statistics.fmean(run['general']['loss'] for run in runs):.4f} | {_signed(spread(general), 4)} | "
                f"{against} | {statistics.fmean(run['mean_weight'] for run in runs):.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _signed(value: Spread, digits: int) -> str:
    return f"{value.mean:+.{digits}f}" + ("" if value.deviation is None else f" ± {value.deviation:.{digits}f}")


def _percent(value: Spread) -> str:
    return f"{value.mean:.1%}" + ("" if value.deviation is None else f" ± {100 * value.deviation:.1f}")


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other beats: none gains as much (x) and forgets as little (y), and one of it more.

    In the order of their gain.
    """
    best = [
        name
        for name, (x, y) in points.items()
        if not any(ox >= x and oy <= y and (ox, oy) != (x, y) for ox, oy in points.values())
    ]
    return sorted(best, key=lambda name: points[name])


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each training set: what was gained on the target against what general text lost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = settings(results)
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(7 * columns, 5 * rows), layout="constrained", squeeze=False)
    for axes, setting in zip(panels.flat, found, strict=False):
        _draw_setting(axes, setting)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    model = f"{len(results['seeds'])} seed(s), bars: one standard deviation, small dots: single runs"
    figure.suptitle(f"Gained on held-out chats against lost on general text ({model}); best is down right")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130)
    plt.close(figure)


def _draw_setting(axes: Any, setting: Setting) -> None:
    means = {}
    for method in setting.methods:
        gains = [-change for change in setting.change(method, "target")]
        losses = setting.change(method, "general")
        x, y = spread(gains), spread(losses)
        means[method] = (x.mean, y.mean)
        colour = COLOURS[method]
        axes.scatter(gains, losses, s=12, color=colour, alpha=0.45, linewidths=0)
        axes.errorbar(
            x.mean, y.mean, xerr=x.deviation, yerr=y.deviation, fmt="o", color=colour, capsize=3, label=method
        )
    corner = [means[name] for name in front(means)]
    axes.step(*zip(*corner, strict=True), where="pre", color="#999999", linewidth=1, linestyle="--", zorder=0)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(
        title=f"{TASKS[setting.task]}: {DATA[setting.data]}",
        xlabel="fall of the loss on held-out chats (nats per token)",
        ylabel="rise of the loss on general text (nats per token)",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="dashed: nothing is better in both", fontsize=9)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Table and picture of the forgetting experiment.")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(argv)
    try:
        results = json.loads(options.results.read_text(encoding="utf-8"))
        text = table(results)
    except (OSError, ValueError, KeyError) as error:
        print(f"outcome: {options.results}: {error!r}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(options.output / "table.md", text)
    draw(results, options.output / "pareto.png")
    print(text)
    print(f"written: {options.output / 'table.md'}, {options.output / 'pareto.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
