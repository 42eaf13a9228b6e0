"""Made-up conversations, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path


def chats(count: int) -> list[dict]:
    """Conversations of one to three turns, unequal in length."""
    rows = []
    for number in range(count):
        messages = [{"role": "system", "content": "add"}]
        for turn in range(1 + number % 3):
            messages.append({"role": "user", "content": f"{number} + {turn}?"})
            messages.append({"role": "assistant", "content": f"{number + turn}, " * (1 + number * 7 % 5)})
        rows.append({"messages": messages})
    return rows


def write(path: Path, rows: list) -> str:
    """JSONL; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)
