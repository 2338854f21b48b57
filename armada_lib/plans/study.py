"""The page of a study: which contrasts there are, what they are, and the answer by the protocol's rules.

Everything comes from committed records and their labels: neither data nor models are needed. The
contrasts follow from the arms of the study's file, so that an arm that is added there is shown here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from armada_lib import contrasts, experiment, guard, profiles, report, results
from armada_lib.contrasts import Contrast
from armada_lib.plans.common import cast, several
from armada_lib.plans.evidence import folder
from armada_lib.plans.study_design import Design, Pair
from armada_lib.profiles import check

STUDY_PARAMETERS = ("study", "teachers", "draws")


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
class Studied(Design):
    """A study and what is committed of it; `teachers`: whose contrasts `frame` shows, with the first's."""

    teachers: list[str]
    draws: int = contrasts.DRAWS

    # -- evidence ------------------------------------------------------------------------------

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
        return [t for t in dict.fromkeys([self.main.teacher, *self.teachers]) if t in there]

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

    def contrast(self, pair: Pair, task: str, level: float = 0.05) -> Contrast | None:
        """The contrast on one task over the seeds that have all its runs; None if none has."""
        sides = [s for s in pair.sides if all((task, arm) in self.planned for arm in s)]
        seeds = [s for s in self.study.tasks[task].seeds
                 if all((task, *a, s) in self.records for side in sides for a in side)]  # fmt: skip
        if not sides or not seeds:
            return None

        def differ(of: Callable[[tuple[Any, ...]], Any]) -> list[Any]:
            return [
                sum(of((task, *a, s)) - of((task, *b, s)) for a, b in sides) / len(sides)
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
        for pair in (x for x in self.pairs if x.teacher in (self.main.teacher, *self.teachers)):
            for task in tasks:
                if (groups is None or pair.group in groups) and (c := self.contrast(pair, task)):
                    rows.append({
                        "group": pair.group, "contrast": pair.name, "task": task,
                        "title": report.title(task), "seeds": c.n, "mean": c.mean, "low": c.low,
                        "high": c.high, "p": c.p, "values": c.values, "bound": c.bound,
                    })  # fmt: skip
        return pd.DataFrame(rows, columns=["group", "contrast", "task", "title", "seeds", "mean",
                                           "low", "high", "p", "values", "bound"])  # fmt: skip
