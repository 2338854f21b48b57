"""The chapters on students that generate: reasoning and instructions."""

from __future__ import annotations

from typing import Any

from armada_lib import gentasks, guard, specs
from armada_lib.plans.common import Plan, methods_of, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS
from armada_lib.results import RunStore

TUNING_PARAMETERS = (
    "profile", "teachers", "student", "suites", "methods", "manifold", "seeds", "protocol",
    "train_size", "test_size", "beta", "gamma", "workers", "keep",
)  # fmt: skip


def tuning(ns: dict[str, Any], block: str) -> Plan:
    """Check the parameters of a chapter on students that generate and make its specs.

    `block`: "reasoning" or "instruction", the part of the profile that says what "auto" means.
    """
    got = guard.params(ns, TUNING_PARAMETERS)
    name, p = profile_of(got)
    usual = getattr(p, block)
    if usual is None:
        raise ValueError(f"profile {name!r} has no block {block!r}")
    able = [n for n, s in p.students.items() if s.lora]
    student = several(got["student"], [usual.student], able, f"student that generates ({name})")[0]
    teachers = several(got["teachers"], usual.teachers, p.teachers, f"teacher (profile {name})")
    suites = [s for s in gentasks.SUITES if block.startswith(gentasks.TASKS[s].group)]
    chosen = several(got["suites"], usual.suites, suites, f"suite of {block}")
    methods = methods_of(got["methods"], usual.methods)
    manifolds = several(got["manifold"], usual.manifolds, MANIFOLDS, "manifold loss")
    seeds = seeds_of(got["seeds"], usual.seeds)
    RunStore().check()
    given = {k: got[k] for k in ("protocol", "train_size", "test_size", "beta", "gamma")}
    found = {
        s.key: s for teacher in teachers
        for s in specs.grid(name, chosen, methods, manifolds, ("paper",), seeds,
                            student=student, teacher=teacher, controls=usual.controls, **given)
    }  # fmt: skip
    return Plan(name, teachers, [student], list(found.values()))
