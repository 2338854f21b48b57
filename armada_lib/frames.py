"""Tables of numbers as evidence to be committed: JSON, a line a row, the same bytes for the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from armada_lib.files import write_text

Frames = dict[str, pd.DataFrame]


def write(frames: Mapping[str, pd.DataFrame], path: str | Path) -> Path:
    """Write frames by name; numbers with six digits, a missing one as null. Returns the path."""
    blocks = []
    for name in sorted(frames):
        rows = [json.dumps([_plain(v) for v in r]) for r in frames[name].itertuples(index=False)]
        head = json.dumps([str(c) for c in frames[name]])
        blocks.append(f"{json.dumps(name)}: [\n" + ",\n".join([head, *rows]) + "\n]")
    return write_text(Path(path), "{\n" + ",\n".join(blocks) + "\n}\n")


def merge(old: Mapping[str, pd.DataFrame], new: Mapping[str, pd.DataFrame]) -> Frames:
    """The frames of `new`, after those rows of `old` that are about other tasks.

    A task is whole in one of the two: its rows in `old` are left out if any frame of `new` has it.
    Frames without a column `task` say what both have in common; ValueError where they differ.
    """
    tasks = {t for frame in new.values() if "task" in frame for t in frame["task"]}
    found = {}
    for name, frame in new.items():
        before = old.get(name, frame.iloc[:0])
        if "task" in frame or "task" in before or frame.empty:  # no rows may mean no columns, too
            rest = before[~before["task"].isin(tasks)] if "task" in before else before.iloc[:0]
            parts = [f for f in (rest, frame) if len(f)]
            found[name] = pd.concat(parts, ignore_index=True) if parts else frame
        elif not before.equals(frame):
            raise ValueError(f"{name}: {before.to_dict()} and {frame.to_dict()} do not go together")
        else:
            found[name] = frame
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return str(value)


def read(path: str | Path) -> Frames:
    """The frames of a file that `write` wrote; missing numbers are nan."""
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: _frame(head, rows) for name, (head, *rows) in raw.items()}


def _frame(head: list[str], rows: list[list[Any]]) -> pd.DataFrame:
    columns = {}
    for name, *values in zip(head, *rows, strict=True):
        missing = [v is None for v in values]
        texts = any(isinstance(v, str) for v in values)
        columns[name] = values if texts or not any(missing) else np.array(values, np.float64)
    return pd.DataFrame(columns, columns=head)
