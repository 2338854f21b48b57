"""The chapter on baselines: one student, one budget; with a mentor (Table 7) or pictures (Table 8)."""

from __future__ import annotations

import itertools
from typing import Any

from armada_lib import chapter, specs
from armada_lib.methods import METHODS, MULTIMODAL
from armada_lib.plans.common import Plan, methods_of, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS, check
from armada_lib.results import RunSpec, RunStore
from armada_lib.settings import Baselines, Pictured

BASELINE_PARAMETERS = (
    "profile", "teacher", "student", "mentor", "tasks", "methods", "manifold", "seeds", "workers", "keep",
)  # fmt: skip


def baselines(ns: dict[str, Any]) -> tuple[Plan, Plan]:
    """Check the parameters of the chapter on baselines and make its specs, Table 7's and Table 8's.

    Within each: one student, one budget. "auto" is the profile's choice for each table. Baselines
    that are named go to their own table, other methods to every table that has one of them then (if
    there is none, to Table 7); a table that has none gets a plan without specs.
    """
    got = chapter.params(ns, BASELINE_PARAMETERS)
    name, p = profile_of(got)
    usual = specs.baselines(p)
    mentor = several(got["mentor"], [usual.mentor], p.students, f"mentor (profile {name})")[0]
    check(got["manifold"], MANIFOLDS, "manifold loss")
    p.teacher(got["teacher"])
    RunStore().check()

    def plan(number: int, block: Baselines | Pictured) -> Plan:
        student = several(got["student"], [block.student], p.students, f"student ({name})")[0]
        tasks = several(got["tasks"], block.tasks, specs.tasks_of(p), "task")
        seeds = seeds_of(got["seeds"], block.seeds)
        methods = methods_of(got["methods"], block.methods)
        chosen = {_table(m) for m in methods} - {0} or {7}
        methods = [m for m in methods if _table(m) in (0, number)] if number in chosen else []
        found: dict[str, RunSpec] = {}
        for task, seed, method in itertools.product(tasks, seeds, methods):
            s = specs.spec(name, task, method, student, got["teacher"], got["manifold"], seed=seed,
                           mentor=mentor)  # fmt: skip
            found.setdefault(s.key, s)
        read = dict.fromkeys([got["teacher"], *(s.teacher for s in found.values() if s.teacher)])
        return Plan(name, list(read), [student], list(found.values()))

    return plan(7, usual), plan(8, specs.pictured(p, "what Table 8 is run with"))


def _table(method: str) -> int:
    """The table of the paper whose baseline a method is, or 0."""
    return 7 if METHODS[method].mentor else 8 if method in MULTIMODAL else 0
