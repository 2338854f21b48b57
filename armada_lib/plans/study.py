"""The page of a study: which contrasts there are, what they are, and the answer by the protocol's rules.

Everything comes from committed records and their labels: neither data nor models are needed. The
contrasts follow from the arms of the study's file, so that an arm that is added there is shown here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from armada_lib import contrasts, experiment, guard, profiles, report, results
from armada_lib.contrasts import Contrast
from armada_lib.methods import METHODS
from armada_lib.plans.common import cast, several
from armada_lib.plans.evidence import folder
from armada_lib.profiles import check

STUDY_PARAMETERS = ("study", "teachers", "draws")
BARE = "undistilled"
PRIMARY, BY_LOSS = "real − shuffled", "by loss"
OVER, BESIDE, BETWEEN = "over undistilled", "real − control", "between teachers"


class Arm(NamedTuple):
    """A line of the study; what its method does not use is None, as in `experiment.Cell`."""

    method: str
    teacher: str | None = None
    manifold: str | None = None
    reading: str | None = None


@dataclass(frozen=True)
class Pair:
    """A contrast: the mean over `sides` of first minus second; `teacher`: whose it is about."""

    group: str
    name: str
    teacher: str
    sides: tuple[tuple[Arm, Arm], ...]


def studied(ns: dict[str, Any]) -> Studied:
    """Check the page's parameters and read the evidence; nothing is computed yet."""
    got = guard.params(ns, STUDY_PARAMETERS)
    files = sorted(p.stem for p in (profiles.ROOT / "params").glob("*.yaml") if _is_study(p))
    study = experiment.load(
        profiles.ROOT / "params" / f"{check(got['study'], files, 'study in params')}.yaml"
    )
    used = list(dict.fromkeys(a.teacher for s in study.stages for a in s.arms))
    teachers = several(got["teachers"], used, used, f"teacher of study {study.name!r}")
    if not isinstance(got["draws"], int) or got["draws"] < 1:
        raise ValueError(f"draws must be a whole number of 1 or more, got {got['draws']!r}")
    return Studied(study, teachers, got["draws"])


def _is_study(path: Any) -> bool:
    return "\nstages:" in path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Studied:
    """A study and what is committed of it; `teachers`: whose contrasts `frame` shows, with the first's."""

    study: experiment.Study
    teachers: list[str]
    draws: int = contrasts.DRAWS

    # -- evidence ------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> list[experiment.Cell]:
        return experiment.cells(self.study)

    @cached_property
    def records(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Committed records of the study's cells, by what makes them the same cell.

        Raises ValueError where two runs of a task have other data or other settings, two of an arm
        other weights, or two are of the same cell.
        """
        path = folder() / f"{self.study.name}.jsonl"
        found = results.read(path) if path.exists() else []
        known, kept = {c.identity for c in self.cells}, {}
        alike: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for r in found:
            s = r["spec"]
            name = (s.task, s.method, s.teacher, s.manifold, s.reading, s.seed)
            if name in known:
                same = (s.profile, s.student_id, s.data_id, s.recipe, s.training)
                weights = (s.alpha, s.beta, s.gamma, s.tau)
                if alike.setdefault(name[:1], same) != same:
                    raise ValueError(
                        f"{path.name}: {s.label} has other data or settings than other runs of {s.task}"
                    )
                if name in kept or alike.setdefault(name[:-1], weights) != weights:
                    raise ValueError(
                        f"{path.name}: {s.label} was run with other weights, too; keep the runs of one "
                        "set of weights in the file"
                    )
                kept[name] = r
        return kept

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """Labels of a task's examples, by task."""
        path = folder() / f"{self.study.name}_labels.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name[0]: np.array(known[r["spec"].data_id]) for name, r in self.records.items()}

    @property
    def seen(self) -> list[str]:
        """Teachers of which a cell is there."""
        there = {name[2] for name in self.records}
        return [t for t in self.teachers if t in there]

    @property
    def said(self) -> str:
        """Profile, and who plays whom in the cells that are there."""
        p = profiles.load(self.study.profile)
        return f"profile {p.name}; {cast(p, self.study.student or p.nlu.student, self.seen)}"

    @property
    def missing(self) -> list[experiment.Cell]:
        return [c for c in self.cells if c.identity not in self.records]

    @property
    def provisional(self) -> bool:
        """Whether a cell of the first stage is missing."""
        return any(c.stage == self.study.stages[0].name for c in self.missing)

    @cached_property
    def drawn(self) -> dict[tuple[Any, ...], np.ndarray]:
        """The score of every run on every draw of examples, by cell: (draws,)."""
        found: dict[tuple[Any, ...], np.ndarray] = {}
        for task in dict.fromkeys(name[0] for name in self.records):
            names = [n for n in self.records if n[0] == task]
            y = self.labels[task]
            drawn = contrasts.rescored(
                self.records[names[0]]["metric"],
                [self.records[n]["predictions"] for n in names], y,
                contrasts.counts(len(y), self.draws),
            )  # fmt: skip
            found |= dict(zip(names, drawn.T, strict=True))
        return found

    # -- contrasts -----------------------------------------------------------------------------

    @property
    def first(self) -> tuple[str, str]:
        """Teacher and reading of the primary contrasts: the first with a real teacher."""
        return next((a.teacher, r) for s in self.study.stages for a in s.arms
                    for r in a.readings if "armada" in a.methods)  # fmt: skip

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every contrast that the study's arms make, primary first."""
        planned = {Arm(*c.identity[1:5]) for c in self.cells}
        entries = [a for s in self.study.stages for a in s.arms]
        both: dict[tuple[str, str], list[str]] = {}
        for t, r in dict.fromkeys((a.teacher, str(r)) for a in entries for r in a.readings):
            losses = [m for m in profiles.MANIFOLDS if Arm("armada", t, m, r) in planned]
            both[t, r] = [m for m in losses if Arm("shuffled", t, m, r) in planned]
        main, found = self.first, []
        both = {main: both[main]} | {k: v for k, v in both.items() if v}
        side = lambda a, b, losses, t, r: tuple((Arm(a, t, m, r), Arm(b, t, m, r)) for m in losses)
        for (t, r), losses in both.items():
            found.append(Pair(PRIMARY, self.who(t, r), t, side("armada", "shuffled", losses, t, r)))
        for m in both[main]:
            found.append(
                Pair(BY_LOSS, report.LOSS[m], main[0], side("armada", "shuffled", [m], *main))
            )
        for (t, r), losses in both.items():
            for method in ("armada", "shuffled"):
                sides = tuple((Arm(method, t, m, r), Arm(BARE)) for m in losses)
                found.append(Pair(OVER, self.named(method, t, r), t, sides))
        for (t, r, method), losses in _controls(entries).items():
            if all(Arm("armada", t, m, r) in planned for m in losses):
                name = self.named(method, t, r)
                own = [
                    (Arm("armada", t, m, r), Arm(method, *_used(method, t, m, r))) for m in losses
                ]
                found.append(Pair(BESIDE, name, t, tuple(own)))
                found.append(Pair(OVER, name, t, tuple((one, Arm(BARE)) for _, one in own)))
        for (t, r), losses in both.items():
            common = [m for m in losses if m in both[main]]
            if t != main[0] and r == main[1] and common:
                sides = tuple(
                    (Arm("armada", t, m, r), Arm("armada", *_of(main, m))) for m in common
                )
                found.append(Pair(BETWEEN, f"{t} − {main[0]}", t, sides))
        return sorted(found, key=lambda p: GROUPS.index(p.group))

    def who(self, teacher: str, reading: str) -> str:
        return teacher if reading == self.first[1] else f"{teacher}, {reading}"

    def named(self, method: str, teacher: str, reading: str) -> str:
        """What contrasts and tables call an arm that learns from a teacher."""
        if method in ("armada", "shuffled"):
            return f"{'real' if method == 'armada' else method} {self.who(teacher, reading)}"
        other = "" if (teacher, reading) == self.first else f", {self.who(teacher, reading)}"
        return f"{report.CONTROLS.get(method, method)}{other}"

    def contrast(self, pair: Pair, task: str, level: float = 0.05) -> Contrast | None:
        """The contrast on one task over the seeds that have all its runs; None if none has."""
        seeds = [s for s in self.study.tasks[task].seeds
                 if all((task, *a, s) in self.records for side in pair.sides for a in side)]  # fmt: skip
        if not seeds:
            return None

        def differ(of: Callable[[tuple[Any, ...]], Any]) -> list[Any]:
            return [
                sum(of((task, *a, s)) - of((task, *b, s)) for a, b in pair.sides) / len(pair.sides)
                for s in seeds
            ]

        values = differ(lambda name: self.records[name]["scores"]["student"])
        drawn = np.stack(differ(lambda name: self.drawn[name]), 1)
        return contrasts.contrast(values, drawn, self.study.tasks[task].bound, level)

    @property
    def tasks(self) -> list[str]:
        """The primary tasks."""
        return self.study.stages[0].tasks

    @property
    def others(self) -> list[str]:
        """Secondary tasks of which something is there."""
        there = {name[0] for name in self.records}
        return [t for t in self.study.tasks if t in there and t not in self.tasks]

    @cached_property
    def primary(self) -> dict[str, Contrast]:
        """The primary family, by task; a task of which nothing is there is left out."""
        pair, level = self.pairs[0], 0.05 / len(self.tasks)
        found = {t: self.contrast(pair, t, level) for t in self.tasks}
        return {t: c for t, c in found.items() if c is not None and c.n > 1}

    def frame(self, tasks: Sequence[str], groups: Sequence[str] | None = None) -> pd.DataFrame:
        """One row a contrast and task: group, contrast, task, title, seeds, mean, low, high, p, values, bound."""
        rows = []
        for pair in (x for x in self.pairs if x.teacher in (self.first[0], *self.teachers)):
            for task in tasks:
                if (groups is None or pair.group in groups) and (c := self.contrast(pair, task)):
                    rows.append({
                        "group": pair.group, "contrast": pair.name, "task": task,
                        "title": report.title(task), "seeds": c.n, "mean": c.mean, "low": c.low,
                        "high": c.high, "p": c.p, "values": c.values, "bound": c.bound,
                    })  # fmt: skip
        return pd.DataFrame(rows, columns=["group", "contrast", "task", "title", "seeds", "mean",
                                           "low", "high", "p", "values", "bound"])  # fmt: skip


GROUPS = (PRIMARY, BY_LOSS, BESIDE, OVER, BETWEEN)


def _controls(entries: Sequence[experiment.Arms]) -> dict[tuple[str, str, str], list[str]]:
    """Losses of every control but the shuffled teacher, by teacher, reading and method."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for a in entries:
        for method, r in itertools.product(a.methods, a.readings):
            if method in report.CONTROLS and method != "shuffled":
                losses = found.setdefault((a.teacher, r, method), [])
                losses += [m for m in a.manifolds if m not in losses]
    return found


def _used(method: str, teacher: str, manifold: str, reading: str) -> tuple[str | None, ...]:
    entry = METHODS[method]
    return (teacher, manifold, reading) if entry.vectors else (None, None, reading)


def _of(main: tuple[str, str], manifold: str) -> tuple[str, str, str]:
    return main[0], manifold, main[1]
