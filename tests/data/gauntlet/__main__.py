"""python -m tests.data.gauntlet [--templates PART ...] [--rows NAME ...] [--output FILE]"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.data.gauntlet import report, sources
from tests.data.gauntlet.rows import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.data.gauntlet", description="Masks on real chat templates.")
    parser.add_argument("--templates", nargs="+", default=[], metavar="PART", help="only those whose name holds PART")
    parser.add_argument("--rows", nargs="+", default=[], choices=list(ROWS), metavar="ROW", help="only these rows")
    parser.add_argument("--output", type=Path, help="write the table (Markdown), without reasons, there")
    arguments = parser.parse_args()
    folder = sources.folder()
    sources.fetch(folder)
    verdicts = report.run(folder, arguments.templates, arguments.rows)
    if arguments.output:
        arguments.output.write_text(report.markdown(verdicts, details=False), encoding="utf-8")
    print(report.markdown(verdicts))


if __name__ == "__main__":
    main()
