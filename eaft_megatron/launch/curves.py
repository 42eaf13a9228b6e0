"""A run's TensorBoard events as one picture and a short table. It shows what was logged and draws no conclusion.

Understands what eaft_megatron.train writes and what Megatron-LM writes under ``eaft_megatron.run``.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

from eaft_megatron.checkpoint_files import TRACKER
from eaft_megatron.files import replacing
from eaft_megatron.hooks.metrics import METRICS, WEIGHT_METRICS

Curve = dict[int, float]
"""Iteration -> value."""

_OTHERS = {"grad norm": ("grad norm", "grad-norm"), "learning rate": ("learning rate", "learning-rate")}
_EVALUATION = (  # how the plain cross entropy of an evaluation set is called; the first group is its name
    re.compile(r"(.+) lm loss"),
    re.compile(r"([^/]+)/lm loss validation"),
    re.compile(r"lm loss validation(?:[- ](?!ppl|vs )(.+?))?"),
)
_PANELS = (
    ("loss", ("lm loss", "eaft loss")),
    ("mean weight", ("eaft weight", *WEIGHT_METRICS[1:])),
    ("entropy of the top K, nats", ("eaft entropy",)),
    ("conflict rate", ("eaft conflict rate",)),
    ("validation: lm loss", ()),
    ("gradient norm", ("grad norm",)),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has logged.

    Attributes:
        folder: the run folder.
        training: metric -> curve, those of METRICS, WEIGHT_METRICS and _OTHERS that are there.
        validation: name of the set -> curve of the plain cross entropy.
        latest: when the last value was written, seconds since the epoch.
        saved: iteration of the newest checkpoint, if there is one.
    """

    folder: Path
    training: dict[str, Curve]
    validation: dict[str, Curve]
    latest: float
    saved: int | None

    @property
    def iteration(self) -> int:
        return max(max(curve) for curve in self.training.values())


def read_run(folder: str | Path) -> Run:
    """Everything logged below the folder. Where a resumed run logged an iteration twice, the later value counts.

    Raises:
        ValueError: no folder, no events, no curve that is known; or TensorBoard is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such run folder: {folder}")
    scalars, latest = _scalars(folder)
    names = {tag: name for name, tags in _OTHERS.items() for tag in tags} | {
        name: name for name in METRICS + WEIGHT_METRICS
    }
    training = {names[tag]: curve for tag, curve in scalars.items() if tag in names}
    validation: dict[str, Curve] = {}
    for tag, curve in scalars.items():
        for pattern in _EVALUATION:
            if (match := pattern.fullmatch(tag)) and not tag.endswith((" vs samples", " ppl")):
                validation[match[1] or "validation"] = curve
                break
    if not training:
        raise ValueError(f"{folder}: events, but none of {', '.join(METRICS)} among them")
    tracker = folder / "checkpoints" / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return Run(folder, training, validation, latest, int(text) if text.isdigit() else None)


def _scalars(folder: Path) -> tuple[dict[str, Curve], float]:
    """(tag -> curve, time of the last value) of all event files below the folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    except ImportError as error:
        raise ValueError("reading events needs TensorBoard: pip install 'eaft_megatron[logging]'") from error
    from tensorboard.util.tensor_util import make_ndarray

    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder}: no TensorBoard events (events.out.tfevents.*) in it yet")
    newest: dict[tuple[str, int], tuple[float, float]] = {}
    for parent in dict.fromkeys(path.parent for path in files):
        events = EventAccumulator(str(parent), size_guidance={SCALARS: 0, TENSORS: 0}, purge_orphaned_data=False)
        events.Reload()
        points = [(tag, e.step, e.wall_time, e.value) for tag in events.Tags()[SCALARS] for e in events.Scalars(tag)]
        for tag in events.Tags()[TENSORS]:  # numbers of newer writers; Megatron-LM writes each of its flags as a text
            arrays = ((e, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag))
            numbers = ((e, value) for e, value in arrays if value.size == 1 and value.dtype.kind in "biuf")
            points += [(tag, e.step, e.wall_time, value.item()) for e, value in numbers]
        for tag, step, when, value in points:
            newest[tag, step] = max(newest.get((tag, step), (0.0, 0.0)), (when, value), key=lambda pair: pair[0])
    curves: dict[str, Curve] = {}
    for (tag, step), (_, value) in sorted(newest.items()):
        curves.setdefault(tag, {})[step] = value
    return curves, max((when for when, _ in newest.values()), default=0.0)


def table(runs: list[Run]) -> str:
    """First and last value of every curve, and the mean of its last tenth."""
    rows = [("", "first", "last", "mean of the last tenth", "values")]
    for run in runs:
        if len(runs) > 1:
            rows.append((str(run.folder), "", "", "", ""))
        sets = {f"{name}: lm loss": curve for name, curve in run.validation.items()}
        for name, curve in {**run.training, **sets}.items():
            values = list(curve.values())
            tail = values[-max(1, len(values) // 10) :]
            first, last, mean = (f"{x:.6g}" for x in (values[0], values[-1], sum(tail) / len(tail)))
            rows.append((name, first, last, mean, str(len(values))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*map(_status, runs), *lines])


def _status(run: Run) -> str:
    minutes = (time.time() - run.latest) / 60
    saved = "no checkpoint" if run.saved is None else f"checkpoint of iteration {run.saved}"
    return f"{run.folder}: iteration {run.iteration}, {saved}, last logged {minutes:.0f} minutes ago"


def draw(runs: list[Run], path: Path) -> None:
    """Six panels: loss, mean weight, entropy, conflict rate, validation loss of every set, gradient norm."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'eaft_megatron[logging]'") from error
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for run in runs:
            curves = {name: run.training[name] for name in names if name in run.training} if names else run.validation
            for name, curve in curves.items():
                label = " ".join([run.folder.name] * (len(runs) > 1) + [name] * (len(names) != 1))
                marker = "." if len(curve) < 30 else None
                axes.plot(list(curve), list(curve.values()), linewidth=1.2, marker=marker, label=label or None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", ha="center", transform=axes.transAxes, color="gray")
        elif axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
