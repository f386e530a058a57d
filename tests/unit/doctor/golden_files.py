"""Golden files of doctor's output. VLAOPT_WRITE_GOLDEN=1 writes them anew; then read what changed."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def hold(name: str, text: str) -> None:
    """Raise AssertionError where `text` is not what the golden file of that name holds."""
    path = FOLDER / name
    if os.environ.get("VLAOPT_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
