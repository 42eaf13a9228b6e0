"""The demo's reader of GGUF files, imported as the demo's scripts import it: from their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from gguf_to_hf import gguf_to_hf, main  # noqa: E402

__all__ = ["gguf_to_hf", "main"]
