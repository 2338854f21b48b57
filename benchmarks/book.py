"""Minutes of the book's chapters: `python -m benchmarks.book` writes `book/results/minutes.json`.

The book is built twice with profile `mini` on an otherwise idle machine: with an empty store, one
chapter after the other, and with what that left, as `make book` does it. The first page and the
README show the file, so that nobody types a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from armada_lib import machine
from armada_lib.profiles import ROOT

OUT = ROOT / "book" / "results" / "minutes.json"


def build(folder: Path, **settings: str) -> float:
    """Seconds of `make book` with store and own projects in `folder`, and with these variables."""
    ours = settings | {name: str(folder / name) for name in ("ARMADA_STORE", "ARMADA_OWN")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ARMADA_")}
    began = time.monotonic()
    subprocess.run(
        ["make", "book"], cwd=ROOT, env=clean | ours | {"ARMADA_PROFILE": "mini"}, check=True
    )
    return time.monotonic() - began


def measure() -> dict[str, Any]:
    """Everything that `minutes.json` holds; times in seconds, cores as chapters count them."""
    left = ROOT / "_build" / ".doctrees" / "seconds.json"
    with tempfile.TemporaryDirectory() as folder:
        first = build(Path(folder), ARMADA_CHAPTERS="1")
        chapters = json.loads(left.read_text(encoding="utf-8"))
        again = build(Path(folder))
    return {
        "profile": "mini", "cores": os.cpu_count(), **machine.environment(),
        "chapters": {name: round(seconds, 1) for name, seconds in sorted(chapters.items())},
        "all": round(first, 1), "stored": round(again, 1),
    }  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.book", description=__doc__).parse_args()
    OUT.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
