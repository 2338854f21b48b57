"""The chapter on baselines: one student, one budget; with a mentor (Table 7) or pictures (Table 8)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from armada_lib import guard, run_data, specs
from armada_lib.blocks import Baselines, Pictured
from armada_lib.methods import METHODS, MULTIMODAL
from armada_lib.plans.common import Plan, methods_of, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS, check
from armada_lib.results import Result, RunSpec, RunStore

BASELINE_PARAMETERS = (
    "profile", "teacher", "student", "mentor", "tasks", "methods", "manifold", "seeds", "workers", "keep",
)  # fmt: skip


Point = tuple[str, str | None, int]  # method, manifold loss, number of the point in the grid


@dataclass(frozen=True)
class Tuned(Plan):
    """A plan whose settings come from a small grid, the same for every method.

    `specs`: every run at the first point of the grid. `tried`: one run a method, point and task of the
    grid, with the first seed, scored on training rows that it does not train on; empty where there is
    one point. `points`: which point a tried run is at, by its key. `options`: all runs at a point.
    `varied`: the settings of the grid.
    """

    tried: list[RunSpec]
    points: dict[str, Point]
    options: dict[Point, list[RunSpec]]
    varied: list[str]

    def chosen(self, found: Sequence[Result]) -> list[RunSpec]:
        """All runs of every method at the point with its highest mean score; of equals the first.

        `found`: Results of `tried`; those of other plans may be among them.
        """
        scores: dict[Point, list[float]] = {}
        for r in found:
            if (point := self.points.get(r.spec.key)) is not None:
                scores.setdefault(point, []).append(r.score)
        best: dict[tuple[str, str | None], Point] = {}
        for point in sorted(scores, key=lambda x: x[2]):
            now = best.setdefault(point[:2], point)
            if sum(scores[point]) > sum(scores[now]):
                best[point[:2]] = point
        return [s for point in best.values() for s in self.options[point]] or self.specs


def baselines(ns: dict[str, Any]) -> tuple[Tuned, Tuned]:
    """Check the parameters of the chapter on baselines and make its specs, Table 7's and Table 8's.

    Within each: one student, one budget, one grid. "auto" is the profile's choice for each table.
    Baselines that are named go to their own table, other methods to every table that has one of them
    then (if there is none, to Table 7); a table that has none gets a plan without specs.
    """
    got = guard.params(ns, BASELINE_PARAMETERS)
    name, p = profile_of(got)
    usual = specs.baselines(p)
    mentor = several(got["mentor"], [usual.mentor], p.students, f"mentor (profile {name})")[0]
    check(got["manifold"], MANIFOLDS, "manifold loss")
    p.teacher(got["teacher"])
    RunStore().check()

    def plan(number: int, block: Baselines | Pictured) -> Tuned:
        student = several(got["student"], [block.student], p.students, f"student ({name})")[0]
        tasks = several(got["tasks"], block.tasks, run_data.tasks_of(p), "task")
        seeds = seeds_of(got["seeds"], block.seeds)
        methods = methods_of(got["methods"], block.methods)
        chosen = {_table(m) for m in methods} - {0} or {7}
        methods = [m for m in methods if _table(m) in (0, number)] if number in chosen else []
        grid = [
            dict(zip(usual.grid, v, strict=True)) for v in itertools.product(*usual.grid.values())
        ]
        looked = [t for t in tasks if t in usual.grid_tasks] or tasks

        def make(task: str, method: str, seed: int, point: dict[str, Any], **more: Any) -> RunSpec:
            return specs.spec(name, task, method, student, got["teacher"], got["manifold"], seed=seed,
                              mentor=mentor, **point, **more)  # fmt: skip

        tried: list[RunSpec] = []
        points: dict[str, Point] = {}
        options: dict[Point, list[RunSpec]] = {}
        for method, n in itertools.product(methods, range(len(grid))):
            made = [make(t, method, seed, grid[n]) for t, seed in itertools.product(tasks, seeds)]
            key = (method, made[0].manifold, n)
            options[key] = list({s.key: s for s in made}.values())
            if len(grid) > 1:
                for task in looked:
                    tried.append(make(task, method, seeds[0], grid[n], split="holdout"))
                    points[tried[-1].key] = key
        first = [s for point, made in options.items() if point[2] == 0 for s in made]
        read = dict.fromkeys([got["teacher"], *(s.teacher for s in first if s.teacher)])
        return Tuned(
            name, list(read), [student], first, tried, points, options, list(usual.grid)
        )  # fmt: skip

    return plan(7, usual), plan(8, specs.pictured(p, "what Table 8 is run with"))


def _table(method: str) -> int:
    """The table of the paper whose baseline a method is, or 0."""
    return 7 if METHODS[method].mentor else 8 if method in MULTIMODAL else 0
