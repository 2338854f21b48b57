"""A study that takes days: what its cells are, run by any number of workers on any number of machines.

A file such as `params/study.yaml` lists stages of arms; a `Cell` is one run of them. All that is
finished is in the run store, so that a study has no state of its own: whoever is started with the
same file and store computes what nobody else has computed or is computing.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from filelock import Timeout
from pydantic import Field, ValidationError, model_validator

from armada_lib import profiles, results, runs, specs
from armada_lib.extraction import pool
from armada_lib.files import write_text
from armada_lib.methods import METHODS
from armada_lib.results import RunSpec, RunStore
from armada_lib.settings import Loss, Strict, check
from armada_lib.state import Diverged
from armada_lib.tasks import TASKS

Say = Callable[[str], None]

# -- what the file says -------------------------------------------------------------------------


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

    ValueError for a name that is none (of a profile, task, teacher or method), for a task without
    seeds, and for two stages of one name.
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
        for task in self.tasks:
            check(task, TASKS, "task")
        for stage in self.stages:
            for task in stage.tasks:
                check(task, self.tasks, f"task of stage {stage.name!r} among those with seeds")
            for a in stage.arms:
                p.teacher(a.teacher)
                for method in a.methods:
                    check(method, METHODS, "method")
        names = [s.name for s in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"each stage needs a name of its own, got {', '.join(names)}")
        return self


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
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
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
            entry = METHODS[method]
            yield Cell(
                task, method, a.teacher if entry.vectors else None,
                manifold if entry.vectors else None, reading if entry.distils else None,
                seed, stage.name,
            )  # fmt: skip


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


def work(found: Sequence[Job], store: RunStore, workers: int, say: Say) -> dict[str, int]:
    """Compute what is missing, in order, with `workers` processes of one thread each.

    A cell that another worker computes, here or on another machine, is left to it. One that
    diverges is named and left out; any other error stops the study. No score is shown, so that
    nobody is tempted. Returns how many cells were `computed`, `diverged`, and are `elsewhere`.
    """
    store.check()
    clock = Clock(store)
    count = {"computed": 0, "diverged": 0, "elsewhere": 0}
    missing = [j for j in found if j.spec not in store]
    for j in found:
        clock.note(j.spec)
    say(f"{len(found):,} cells, {len(found) - len(missing):,} stored{clock.left(missing, workers)}")
    diverged: set[str] = set()
    while missing:
        before = count["computed"]
        for job, outcome in _outcomes(missing, store, workers):
            if outcome == "computed":
                count["computed"] += 1
                clock.note(job.spec)
                rest = [j for j in missing if j.spec not in store]
                done = len(found) - len(rest) - len(diverged)
                took = clock.seconds[job.spec.key]
                left = clock.left(rest, workers)
                say(f"{done:>5,} of {len(found):,} | {job.name} | {took:.0f} s{left}")
            elif outcome != "elsewhere":
                diverged.add(job.spec.key)
                say(f"{job.name} has no result: {outcome}")
        missing = [j for j in missing if j.spec not in store and j.spec.key not in diverged]
        if count["computed"] == before:
            break  # all that is left is being computed elsewhere
    count |= {"diverged": len(diverged), "elsewhere": len(missing)}
    return count


def _outcomes(missing: Sequence[Job], store: RunStore, workers: int) -> Iterator[tuple[Job, str]]:
    """Each job with what became of it; one that is stored by its turn is left out."""
    queue = (j for j in missing if j.spec not in store)
    if workers <= 1:
        for job in queue:
            yield job, attempt(job.spec, store.root)
        return
    with pool(min(workers, len(missing))) as processes:
        running: dict[Future[str], Job] = {}
        while True:
            for job in itertools.islice(queue, workers - len(running)):
                running[processes.submit(attempt, job.spec, store.root)] = job
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()


def attempt(s: RunSpec, root: Path) -> str:
    """Run one cell unless another worker does, or has: "computed", "elsewhere", or why it diverged."""
    store = RunStore(root)
    if s in store:
        return "elsewhere"
    try:
        runs.run(s, store, wait=False)
    except Timeout:
        return "elsewhere"
    except Diverged as e:
        return str(e)
    return "computed"


@dataclass
class Clock:
    """How long the cells of a store took, and what is left."""

    store: RunStore
    seconds: dict[str, float] = field(default_factory=dict)  # by key
    kinds: dict[tuple[str, str | None], list[float]] = field(default_factory=dict)

    def note(self, s: RunSpec) -> None:
        """Take in a finished cell; one that is not stored says nothing."""
        if s in self.store and (found := self.store.load(s.key)) is not None:
            self.seconds[s.key] = found.facts["seconds"]
            self.kinds.setdefault((s.task, s.reading), []).append(found.facts["seconds"])

    def left(self, missing: Sequence[Job], workers: int) -> str:
        """ ", 3 h 20 min left with 2 workers", from cells of the same task and reading if any are there."""
        if not missing or not self.seconds:
            return ""
        mean = lambda xs: sum(xs) / len(xs)
        every = mean(list(self.seconds.values()))
        kinds = {kind: mean(found) for kind, found in self.kinds.items()}
        rest = sum(kinds.get((j.spec.task, j.spec.reading), every) for j in missing) / workers
        hours, minutes = divmod(math.ceil(rest / 60), 60)
        who = "1 worker" if workers == 1 else f"{workers} workers"
        return f", {f'{hours} h ' if hours else ''}{minutes} min left with {who}"


# -- again --------------------------------------------------------------------------------------

# How far a metric may be from the stored one, in points, when a cell is computed again by one
# thread on the same kind of processor with the same torch. Elsewhere kernels round otherwise.
TOLERANCE = {"fp32": 0.0, "bf16": 0.5}


def repeat(job: Job, study: Study, store: RunStore) -> tuple[pd.DataFrame, bool]:
    """Compute a finished cell anew: (head, stored, again), and whether all are within `TOLERANCE`.

    Stored is what the store holds, else what is committed in book/results; ValueError if neither
    does. Nothing is written to either.
    """
    found, path = store.load(job.spec.key), _evidence(study)
    if found is not None:
        stored = found.scores
    else:
        kept = _records(path)
        if job.spec.key not in kept:
            raise ValueError(f"{job.name} is neither in {store.root} nor in {path.name}")
        stored = kept[job.spec.key]["scores"]
    store.check()
    runs.prepare([job.spec], store)
    with tempfile.TemporaryDirectory() as folder:
        again = runs.compute(job.spec, store, state=Path(folder) / "state.safetensors").scores
    table = pd.DataFrame({"stored": stored, "again": again}).rename_axis("head").reset_index()
    apart = (table["stored"] - table["again"]).abs()
    return table, bool((apart <= TOLERANCE[job.spec.training.precision]).all())


# -- evidence -----------------------------------------------------------------------------------


def _evidence(study: Study) -> Path:
    return profiles.ROOT / "book" / "results" / f"{study.name}.jsonl"


def committed(study: Study) -> set[str]:
    """Keys of the cells that are in book/results already, whoever computed them."""
    return set(_records(_evidence(study)))


def _records(path: Path) -> dict[str, dict[str, Any]]:
    return {r["key"]: r for r in results.read(path)} if path.exists() else {}


def export(study: Study, store: RunStore, folder: Path | None = None) -> tuple[Path, int]:
    """Write the finished cells to `folder`/<name>.jsonl, and their labels beside it; returns the
    file and how many cells of the study it holds.

    A record has predictions and no labels: all cells of a task share these, and <name>_labels.json
    keeps them once, by `data_id`, so that examples can be resampled where the data are not at hand.
    Cells that were exported from another store stay.
    """
    path = folder / f"{study.name}.jsonl" if folder else _evidence(study)
    beside = path.with_name(f"{study.name}_labels.json")
    own = {j.spec.key for j in jobs(study)}
    found = [r for k in sorted(own) if (r := store.load(k)) is not None]
    old = _records(path)
    labels = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    for r in found:
        labels[r.spec.data_id] = [round(float(y), 3) for y in r.labels]
    results.export([*old.values(), *found], path)
    write_text(beside, json.dumps(labels, sort_keys=True) + "\n")
    return path, len(own & (old.keys() | {r.spec.key for r in found}))
