"""Slurm's way of writing a time limit, and what this job needs of it."""

from __future__ import annotations

import re

from eaft_megatron.launch.recipe import Slurm

_STARTING = 120
"""Seconds: a start needs some before it can save anything, and Slurm may send its signal a minute early."""
_OURS = ("time", "signal", "output", "nodes", "ntasks-per-node", "job-name", "requeue", "no-requeue", "open-mode")
_FORMS = (  # man sbatch, --time
    re.compile(r"(?P<minutes>\d+)(?::(?P<seconds>\d+))?"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?"),
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def limit_seconds(text: str) -> int | None:
    """Seconds of a ``--time``; None: no limit.

    Raises:
        ValueError: none of Slurm's forms.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    for form in _FORMS:
        if match := form.fullmatch(text):
            return sum(_SECONDS[unit] * int(number) for unit, number in match.groupdict().items() if number)
    raise ValueError(
        f"slurm.time must be minutes, MINUTES:SECONDS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED, got {text!r}"
    )


def check_time(slurm: Slurm) -> None:
    """``ValueError`` where the job would be asked to save as soon as it starts, or ``options`` say what others do."""
    if slurm.save_seconds < 1:
        raise ValueError(f"slurm.save_seconds must be >= 1, got {slurm.save_seconds}")
    limit = limit_seconds(slurm.time)
    if limit is not None and limit < slurm.save_seconds + _STARTING:
        raise ValueError(
            f"slurm.time {slurm.time} is {limit} seconds, and slurm.save_seconds asks the ranks to save "
            f"{slurm.save_seconds} seconds before its end: give it at least {slurm.save_seconds + _STARTING} seconds, "
            "or lower slurm.save_seconds to what a save takes"
        )
    for option in slurm.options:
        name = re.split(r"[= ]", option.lstrip("-"))[0]
        if name in _OURS or re.match(r"-[tNJo](?!-)", option):
            raise ValueError(
                f"slurm.options: {option} is set by the recipe itself (slurm.time, slurm.save_seconds, slurm.requeue, "
                "parallel.nodes, name): remove it and set that key"
            )
