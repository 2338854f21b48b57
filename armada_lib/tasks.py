"""The paper's tasks: columns, the text given to student and teacher, label kind, metric, files.

`examples` reads their rows. A profile may hold tasks of one's own, each with its own tables
(`settings.OwnTask`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from armada_lib import films
from armada_lib.settings import OwnTask, check
from armada_lib.tables import Row


@dataclass(frozen=True)
class Task:
    """One task. `pair` returns the student's two texts (the second may be None)."""

    name: str
    title: str
    group: Literal["glue", "super_glue", "mmimdb", "own"]
    columns: tuple[str, ...]
    outputs: int
    metric: Literal["accuracy", "mcc", "pearson", "micro_f1"]
    hub: tuple[str, str] | None  # None: no copy with the official splits is known
    pair: Callable[[Row], tuple[str, str | None]]
    kind: Literal["class", "regression", "choice", "multilabel"] = "class"
    splits: dict[str, str] = field(default_factory=dict)
    choices: Callable[[Row], list[tuple[str, str]]] | None = None
    file: str | None = None  # folder name, where it is not the task's
    target: str = "label"  # the column of the labels
    labels: tuple[str, ...] = ()  # names of the outputs, where the column holds names
    also: tuple[Literal["macro_f1"], ...] = ()  # metrics beside the main one
    teacher_text: Callable[[Row], str] | None = None  # None: the parts joined by a space (A15)
    source: str = ""  # how to make the files, where no hub has them
    own: OwnTask | None = None  # where its tables are, if it is none of `TASKS`


def _two(a: str, b: str) -> Callable[[Row], tuple[str, str | None]]:
    return lambda r: (r[a], r[b])


ASK = {"cause": "What was the cause?", "effect": "What happened as a result?"}


def _copa_asks(r: Row) -> str:
    if r["question"] not in ASK:
        raise ValueError(
            f"COPA, row {r.get('idx')}: question is {r['question']!r}, not cause or effect"
        )
    return f"{r['premise']} {ASK[r['question']]}"


def _copa_choices(r: Row) -> list[tuple[str, str]]:
    return [(_copa_asks(r), r["choice1"]), (_copa_asks(r), r["choice2"])]


def _copa_pair(r: Row) -> tuple[str, str | None]:
    """Both choices in one text, two classes: the paper's pair classification (A36)."""
    return _copa_asks(r), f"{r['choice1']} {r['choice2']}"


def _glue(
    name: str,
    title: str,
    cols: tuple[str, ...],
    outputs: int = 2,
    metric: str = "accuracy",
    **kw: Any,
) -> Task:
    pair = kw.pop("pair", None) or (
        _two(cols[0], cols[1]) if len(cols) > 1 else (lambda r: (r[cols[0]], None))
    )
    return Task(
        name,
        title,
        kw.pop("group", "glue"),
        cols,
        outputs,
        metric,  # type: ignore[arg-type]
        kw.pop("hub", ("nyu-mll/glue", name)),
        pair,
        **kw,
    )


_S12 = ("sentence1", "sentence2")
_PH = ("premise", "hypothesis")
_SG = "aps/super_glue"
_M = {"validation": "validation_matched"}
_MM = {"validation": "validation_mismatched"}
_COPA = ("premise", "choice1", "choice2", "question")

TASKS: dict[str, Task] = {t.name: t for t in (
    _glue("cola", "CoLA", ("sentence",), metric="mcc"),
    _glue("mrpc", "MRPC", _S12),
    _glue("rte", "RTE", _S12),
    _glue("stsb", "STS-B", _S12, 1, "pearson", kind="regression"),
    _glue("sst2", "SST-2", ("sentence",)),
    _glue("mnli", "MNLI", _PH, 3, splits=_M),
    _glue("mnli_mm", "MNLI-mm", _PH, 3, splits=_MM, hub=("nyu-mll/glue", "mnli"), file="mnli"),
    _glue("qnli", "QNLI", ("question", "sentence")),
    _glue("qqp", "QQP", ("question1", "question2")),
    _glue("cb", "CB", _PH, 3, group="super_glue", hub=(_SG, "cb")),
    _glue("copa", "COPA", _COPA, 1, group="super_glue", hub=(_SG, "copa"), kind="choice",
          pair=_copa_pair, choices=_copa_choices),
    _glue("boolq", "BoolQ", ("question", "passage"), group="super_glue", hub=(_SG, "boolq")),
    _glue("wic", "WiC", ("word", *_S12), group="super_glue", hub=(_SG, "wic"),
          pair=lambda r: (f"{r['word']}: {r['sentence1']}", r["sentence2"])),
    # Table 9: the student reads the plot; a teacher is told its first sentence, or kept a poster for it
    _glue("mmimdb", "MM-IMDb", ("plot",), len(films.GENRES), "micro_f1", group="mmimdb", hub=None,
          kind="multilabel", target="genres", labels=films.GENRES, also=("macro_f1",),
          teacher_text=lambda r: films.opening(r["plot"]),
          source="`python -m armada_lib films` makes it of the authors' archive mmimdb.tar.gz"),
)}  # fmt: skip


def get(name: str, copa: str = "choice", own: OwnTask | None = None) -> Task:
    """The task of that name, or `profiles.Unknown` listing the valid ones; `own`: what it is else.

    ValueError for an `own` task that has the name of one of the paper's.
    """
    if own is not None:
        return _own(name, own)
    task = TASKS[check(name, TASKS, "task")]
    if task.kind == "choice" and copa == "pair":
        return replace(task, kind="class", outputs=2, choices=None)
    return task


def _own(name: str, own: OwnTask) -> Task:
    if name in TASKS:
        raise ValueError(f"own task {name!r}: the paper has a task of this name; choose another")
    first, *rest = own.texts
    return Task(
        name, name, "own", own.texts, len(own.labels) or 1,
        own.metric or ("pearson" if own.scale else "accuracy"), None,
        lambda r: (r[first], r[rest[0]] if rest else None),
        kind="regression" if own.scale else "class", target=own.label, labels=own.labels,
        teacher_text=lambda r: " ".join(r[c] for c in own.texts), own=own,
    )  # fmt: skip
