"""All templates x all rows, and the table of what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.data.gauntlet import sources
from tests.data.gauntlet.adapter import encode, way_out
from tests.data.gauntlet.judge import Verdict, judge
from tests.data.gauntlet.rows import ROWS, Row
from tests.data.gauntlet.tokenizers import build

_WAYS_OUT = 3  # refusals that a user meets one after another, each with its way out
KINDS = ("right", "way out", "refused", "wrong", "lost")
Verdicts = dict[str, dict[str, Verdict]]


def verdict(tokenizer, row: Row) -> Verdict:
    """One row through the encoder; where it is refused and the refusal names a way out, through that as well.

    A row that is left out with a word is neither wrong nor a way out: it is refused.
    """
    outcome = encode(tokenizer, row)
    if outcome.crash:
        return Verdict("wrong", [f"crash: {outcome.crash}"])
    if outcome.refusal is None and not outcome.samples and outcome.losses:
        return Verdict("refused", list(outcome.losses))
    if outcome.refusal is None:
        return judge(tokenizer, row, outcome.samples, outcome.losses)
    options: dict = {}
    again = outcome
    for _ in range(_WAYS_OUT):
        if again.refusal is None or not (named := way_out(again.refusal)):
            break
        options |= named
        again = encode(tokenizer, row, **options)
    if again.crash:
        return Verdict("wrong", [f"crash with {options}: {again.crash}"])
    if again.samples:
        taken = judge(tokenizer, row, again.samples, again.losses)
        return Verdict("way out", [outcome.refusal]) if taken.kind == "right" else taken
    return Verdict("refused", [outcome.refusal])  # also where the only way out is to leave the row out


def run(folder: Path, names: Iterable[str] = (), rows: Iterable[str] = ()) -> Verdicts:
    """Template -> row -> verdict; of templates whose name holds one of `names`, or all."""
    names, rows = tuple(names), tuple(rows) or tuple(ROWS)
    verdicts: Verdicts = {}
    for name, template in sources.load(folder).items():
        if not names or any(part in name for part in names):
            tokenizer = build(folder, template)
            verdicts[name] = {row: verdict(tokenizer, ROWS[row]) for row in rows}
    return verdicts


def totals(verdicts: Verdicts) -> Counter:
    return Counter(v.kind for rows in verdicts.values() for v in rows.values())


def markdown(verdicts: Verdicts, *, details: bool = True) -> str:
    """Totals, counts by template and by row; with `details` the first reasons of each thing that is not right."""
    total = totals(verdicts)
    count = sum(total.values())
    shares = ", ".join(f"{kind} {total[kind]} ({total[kind] / count:.1%})" for kind in KINDS)
    lines = [
        "# Chat templates x conversations",
        "",
        f"{len(verdicts)} templates of {', '.join(sources.PACKAGES.values())}",
    ]
    lines += [f"and `tests/data/templates`, {count} pairs: {shares}.", ""]
    lines += ["`way out`: refused, and right with the option that the refusal names. `lost`: text of the row missing,"]
    lines += ["without a word.", ""]
    by_row: dict[str, list[Verdict]] = {}
    for rows in verdicts.values():
        for row, v in rows.items():
            by_row.setdefault(row, []).append(v)
    lines += _table("template", {name: list(rows.values()) for name, rows in verdicts.items()})
    lines += ["", *_table("row", by_row)]
    if not details:
        return "\n".join(lines) + "\n"
    lines += ["", "## Not right", ""]
    for name, rows in verdicts.items():
        for row, v in rows.items():
            if v.kind != "right":
                lines.append(f"- {name}, {row}: {v.kind}: {' '.join('; '.join(v.reasons[:2]).split())[:220]}")
    return "\n".join(lines) + "\n"


def _table(title: str, groups: dict[str, list[Verdict]]) -> list[str]:
    lines = [f"| {title} | {' | '.join(KINDS)} |", "|---" + "|---:" * len(KINDS) + "|"]
    for name, verdicts in groups.items():
        counts = Counter(v.kind for v in verdicts)
        lines.append(f"| {name} | {' | '.join(str(counts[kind] or '') for kind in KINDS)} |")
    return lines
