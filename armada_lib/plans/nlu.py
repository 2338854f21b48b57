"""The chapter on natural language understanding."""

from __future__ import annotations

from typing import Any

from armada_lib import guard, run_data, specs
from armada_lib.plans.common import Plan, methods_of, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS, READINGS
from armada_lib.results import RunStore

NLU_PARAMETERS = (
    "profile", "teacher", "student", "tasks", "methods", "manifold", "reading", "seeds",
    "alpha", "beta", "gamma", "tau", "workers", "keep",
)  # fmt: skip


def nlu(ns: dict[str, Any]) -> Plan:
    """Check the NLU chapter's parameters and make its specs; nothing is computed yet.

    Raises one clear error for an unknown parameter or name, a weight out of range, data or
    checkpoints that are missing, and a store that cannot be written to.
    """
    got = guard.params(ns, NLU_PARAMETERS)
    name, p = profile_of(got)
    p.teacher(got["teacher"])
    students = several(got["student"], [p.nlu.student], p.students, f"student (profile {name})")
    wanted = several(got["tasks"], p.nlu.tasks, run_data.tasks_of(p), "task")
    methods = methods_of(got["methods"], p.nlu.methods)
    manifolds = several(got["manifold"], p.nlu.manifolds, MANIFOLDS, "manifold loss")
    readings = several(got["reading"], p.nlu.readings, READINGS, "reading")
    seeds = seeds_of(got["seeds"], p.nlu.seeds)
    weights = {k: got[k] for k in ("alpha", "beta", "gamma", "tau")}
    RunStore().check()
    planned = [
        s for student in students
        for s in specs.grid(name, wanted, methods, manifolds, readings, seeds,
                           student=student, teacher=got["teacher"], controls=p.nlu.controls, **weights)
    ]  # fmt: skip
    return Plan(name, [got["teacher"]], students, planned)
