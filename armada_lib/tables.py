"""Tables of one's own: rows of a .csv, .jsonl or .parquet file, and the share kept for evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
KINDS = (".csv", ".jsonl", ".parquet")
SEED = 2026  # fixes which rows are held out, for every method and seed


def read(path: str | Path) -> list[Row]:
    """Every row of a table as a dict; all values of a .csv are strings.

    Raises FileNotFoundError, and ValueError for a file of another kind, one that cannot be read as
    what its name says, and one without rows.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: a table is a file that ends in {', '.join(KINDS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such table")
    rows: list[Row]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as f:  # Excel begins with a mark
                if path.suffix == ".csv":
                    rows = list(csv.DictReader(f, strict=True))
                else:  # not splitlines(): a text may hold U+2028
                    rows = [json.loads(line) for line in f if line.strip()]
        except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as e:
            raise ValueError(f"{path} cannot be read as {path.suffix[1:]} in UTF-8: {e}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: no rows, or rows that have no names")
    ragged = [n for n, row in enumerate(rows) if None in row or None in row.values()]
    if ragged and path.suffix == ".csv":  # where nothing else makes a value None
        raise ValueError(f"{path}, row {ragged[0]}: it has more or fewer cells than the first line")
    return rows


def column(rows: list[Row], name: str, source: str) -> list[Any]:
    """One column; ValueError, listing those there are, if it is missing."""
    if missing := [n for n, row in enumerate(rows) if name not in row]:
        raise ValueError(
            f"{source}, row {missing[0]}: no column {name!r}; there are {', '.join(map(str, rows[0]))}"
        )
    return [row[name] for row in rows]


def apart(groups: list[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on (n,), rows held out (m,)): about `share` of them held out, drawn once.

    Rows of one group (the same text) stay together, so that no evaluated text was trained on.
    Raises ValueError if either part would be empty.
    """
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(SEED).permutation(len(names))
    held = {names[i] for i in order[: round(share * len(names))]}
    at = np.array([g in held for g in groups], dtype=bool)
    if at.all() or not at.any():
        raise ValueError(
            f"{len(names)} different texts cannot be split with {share:.0%} held out: give more rows"
        )
    return np.flatnonzero(~at), np.flatnonzero(at)
