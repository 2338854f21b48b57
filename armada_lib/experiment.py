"""A study that takes days: what its cells are, and which of them are committed.

A file such as `params/study.yaml` lists stages of arms; a `Cell` is one run of them. `working`
computes them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from armada_lib import profiles, results, specs
from armada_lib.files import write_text
from armada_lib.methods import METHODS
from armada_lib.results import RunSpec, RunStore
from armada_lib.settings import Loss, Strict, check
from armada_lib.tasks import TASKS

# -- what the file says -------------------------------------------------------------------------


# What a study can contrast: the method, its controls, and the student alone.
ARMS = [m for m, entry in METHODS.items() if entry.distils or m == "undistilled"]


class Arms(Strict):
    """Every combination of these is an arm; `manifolds` and `readings` serve the methods with any."""

    methods: list[str] = Field(min_length=1)
    teacher: str = "sd14"
    manifolds: list[Loss] = Field(["euclid"], min_length=1)
    readings: list[Literal["paper", "released"]] = Field(["paper"], min_length=1)


class Stage(Strict):
    """Arms on tasks, run seed by seed: every beginning of a stage is balanced."""

    name: str
    tasks: list[str] = Field(min_length=1)
    arms: list[Arms] = Field(min_length=1)


class TaskSeeds(Strict):
    """Seeds of a task, the smallest difference that matters, and what the profile does not set."""

    seeds: list[int] = Field(min_length=1)
    bound: float | None = Field(None, gt=0, allow_inf_nan=False)
    training: dict[str, Any] = Field(default_factory=dict)


class Study(Strict):
    """A whole study; the first stage holds its primary contrasts.

    ValueError for a name that is none (of a profile, task, teacher, method or training setting), for
    a task without seeds or with several labels an example, for a stage, task or seed given twice, and
    for a first stage without a real and a shuffled teacher to compare.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    profile: str
    student: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    tasks: dict[str, TaskSeeds]
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> Study:
        p = profiles.load(self.profile)
        for key in itertools.chain(self.training, *(t.training for t in self.tasks.values())):
            check(key, profiles.Training.model_fields, "training setting")
        for task, of in self.tasks.items():
            check(task, [t for t in TASKS if TASKS[t].kind != "multilabel"], "task of a study")
            _once(of.seeds, f"seed of {task}")
        names = [s.name for s in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"each stage needs a name of its own, got {', '.join(names)}")
        for stage in self.stages:
            _once(stage.tasks, f"task of stage {stage.name!r}")
            for task in stage.tasks:
                check(task, self.tasks, f"task of stage {stage.name!r} among those with seeds")
            for a in stage.arms:
                p.teacher(a.teacher)
                for method in a.methods:
                    check(method, ARMS, "method")
        first = self.stages[0]
        made = {(c.method, c.teacher, c.manifold, c.reading) for c in _arms(first, "", 0)}
        if not any(("shuffled", *of) in made for method, *of in made if method == "armada"):
            raise ValueError(
                f"stage {first.name!r} holds the primary contrasts: it needs the methods armada and "
                "shuffled with the same teacher, manifold loss and reading"
            )
        return self


def _once(found: Sequence[Any], what: str) -> None:
    if twice := [x for n, x in enumerate(found) if x in found[:n]]:
        raise ValueError(f"{what} {twice[0]!r} is given twice")


@dataclass(frozen=True)
class Cell:
    """One run of a study. What a method does not use is None, so that equal work is one cell."""

    task: str
    method: str
    teacher: str | None
    manifold: str | None
    reading: str | None
    seed: int
    stage: str = ""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes it the same cell in a committed record."""
        return self.task, self.method, self.teacher, self.manifold, self.reading, self.seed

    def spec(self, study: Study) -> RunSpec:
        """The complete specification; reads the task's rows and identifies the checkpoints."""
        given = {"manifold": self.manifold, "reading": self.reading, "teacher": self.teacher}
        own: dict[str, Any] = {k: v for k, v in given.items() if v}
        own |= study.training | study.tasks[self.task].training
        return specs.spec(
            study.profile, self.task, self.method, study.student, seed=self.seed, **own
        )


def load(path: str | Path) -> Study:
    """Read and validate a file of a study; ValueError names the file and what is wrong in it.

    FileNotFoundError if it is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of a study")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise ValueError(f"{path}: this is no YAML: {e}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a study is a mapping, got {type(raw).__name__}")
    try:
        return Study(**raw)
    except ValidationError as e:
        said = (f"{'.'.join(map(str, x['loc']))}: {x['msg']}".strip(": ") for x in e.errors())
        raise ValueError(f"{path}: {'; '.join(said)}") from None


def cells(study: Study) -> list[Cell]:
    """Every cell once, in the order in which they are to be run."""
    found: dict[tuple[Any, ...], Cell] = {}
    for stage in study.stages:
        most = max(len(study.tasks[t].seeds) for t in stage.tasks)
        for n, task in itertools.product(range(most), stage.tasks):
            for seed in study.tasks[task].seeds[n : n + 1]:
                for cell in _arms(stage, task, seed):
                    found.setdefault(cell.identity, cell)
    return list(found.values())


def _arms(stage: Stage, task: str, seed: int) -> Iterator[Cell]:
    for a in stage.arms:
        for method, reading, manifold in itertools.product(a.methods, a.readings, a.manifolds):
            own = used(method, a.teacher, manifold, reading)
            yield Cell(task, method, *own, seed, stage.name)


def used(
    method: str, teacher: str, manifold: str, reading: str
) -> tuple[str | None, str | None, str | None]:
    """Teacher, manifold loss and reading, each None where the method does not use it."""
    entry = METHODS[method]
    own = (teacher, manifold) if entry.vectors else (None, None)
    return (*own, reading if entry.distils else None)


# -- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A cell with its specification and its number in the study."""

    number: int
    cell: Cell
    spec: RunSpec

    @property
    def name(self) -> str:
        return f"{self.spec.label}{f' {self.cell.teacher}' if self.cell.teacher else ''}"


def jobs(study: Study) -> list[Job]:
    """The study's cells, ready to run."""
    return [Job(n, c, c.spec(study)) for n, c in enumerate(cells(study))]


def pick(study: Study, name: str) -> Job:
    """The job of that number or key; ValueError if there is none."""
    if name.isdigit() and len(name) < 20:  # a key has 20 signs
        every = cells(study)
        if int(name) < len(every):
            return Job(int(name), every[int(name)], every[int(name)].spec(study))
        raise ValueError(f"cell {name}: the study has cells 0 to {len(every) - 1}")
    if found := [j for j in jobs(study) if j.spec.key == name]:
        return found[0]
    raise ValueError(f"cell {name!r}: neither a number nor a key of this study; --list has both")


# -- evidence -----------------------------------------------------------------------------------


def _evidence(study: Study) -> Path:
    return profiles.ROOT / "book" / "results" / f"{study.name}.jsonl"


def anywhere(s: RunSpec) -> str:
    """A key that is the same on every machine.

    A teacher's fingerprint counts the precision in which its machine computes, so the key of a cell
    differs between kinds of machine; its vectors hardly do (`teachers.image`). A study goes on from
    one machine to another by this.
    """
    return s.model_copy(update={"teacher_id": None}).key


def stored(s: RunSpec, store: RunStore) -> str | None:
    """The key under which a cell is in `store`, its own or that of another kind of machine; else None."""
    if s in store:
        return s.key
    note = other_key(s, store)
    if note.exists() and (store.runs / (key := note.read_text()) / "result.json").exists():
        return key
    return None


def lacking(found: Sequence[Job], store: RunStore) -> list[Job]:
    """Those of the jobs that are not in `store`."""
    return [j for j in found if stored(j.spec, store) is None]


def other_key(s: RunSpec, store: RunStore) -> Path:
    """Where the machine that computes a cell leaves its key of it, for machines of another kind."""
    return store.root / "cells" / anywhere(s)


def committed(study: Study) -> dict[str, dict[str, Any]]:
    """Records of the cells that are in book/results already, whoever computed them, by `anywhere`."""
    return _records(_evidence(study))


def _records(path: Path) -> dict[str, dict[str, Any]]:
    return {anywhere(r["spec"]): r for r in results.read(path)} if path.exists() else {}


def export(study: Study, store: RunStore, folder: Path | None = None) -> tuple[Path, int]:
    """Write the finished cells to `folder`/<name>.jsonl, and their labels beside it; returns the
    file and how many cells of the study it holds.

    A record has predictions and no labels: all cells of a task share these, and <name>_labels.json
    keeps them once, by `data_id`, so that examples can be resampled where the data are not at hand.
    Cells that were exported from another store stay, unless this one has them, too. ValueError if
    the file holds cells of another profile.
    """
    path = folder / f"{study.name}.jsonl" if folder else _evidence(study)
    beside = path.with_name(f"{study.name}_labels.json")
    kept = _records(path)
    if other := {r["spec"].profile for r in kept.values()} - {study.profile}:
        raise ValueError(
            f"{path.name} holds cells of profile {other.pop()!r}: give a study of profile "
            f"{study.profile!r} a name of its own"
        )
    own = {anywhere(s): s for s in sorted((j.spec for j in jobs(study)), key=lambda s: s.key)}
    keys = ((n, stored(s, store)) for n, s in own.items())
    found = {n: r for n, key in keys if key and (r := store.load(key)) is not None}
    every: dict[str, Any] = kept | found
    labels = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    for r in found.values():
        labels[r.spec.data_id] = [round(float(y), 3) for y in r.labels]
    results.export(every.values(), path)
    write_text(beside, json.dumps(labels, sort_keys=True) + "\n")
    return path, len(every.keys() & own.keys())
