"""The chapter on baselines: one student, one mentor, one budget."""

from __future__ import annotations

import itertools
from typing import Any

from armada_lib import chapter, specs
from armada_lib import tasks as task_table
from armada_lib.plans.common import Plan, methods_of, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS, check
from armada_lib.results import RunSpec, RunStore

BASELINE_PARAMETERS = (
    "profile", "teacher", "student", "mentor", "tasks", "methods", "manifold", "seeds", "workers", "keep",
)  # fmt: skip


def baselines(ns: dict[str, Any]) -> Plan:
    """Check the parameters of the chapter on baselines and make its specs: one student, one budget."""
    got = chapter.params(ns, BASELINE_PARAMETERS)
    name, p = profile_of(got)
    block = specs.baselines(p)
    student = several(got["student"], [block.student], p.students, f"student (profile {name})")[0]
    mentor = several(got["mentor"], [block.mentor], p.students, f"mentor (profile {name})")[0]
    wanted = several(got["tasks"], block.tasks, task_table.TASKS, "task")
    methods = methods_of(got["methods"], block.methods)
    manifold = check(got["manifold"], MANIFOLDS, "manifold loss")
    seeds = seeds_of(got["seeds"], block.seeds)
    p.teacher(got["teacher"])
    RunStore().check()
    found: dict[str, RunSpec] = {}
    for task, seed, method in itertools.product(wanted, seeds, methods):
        s = specs.spec(name, task, method, student, got["teacher"], manifold, seed=seed,
                       mentor=mentor)  # fmt: skip
        found.setdefault(s.key, s)
    return Plan(name, [got["teacher"]], [student], list(found.values()))
