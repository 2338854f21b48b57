"""The chapter on MM-IMDb: the student reads plots, the aligner posters."""

from __future__ import annotations

from typing import Any

from armada_lib import guard, profiles, run_data, specs, views
from armada_lib.plans.common import Plan, methods_of, profile_of, seeds_of, several
from armada_lib.profiles import MANIFOLDS, READINGS, check
from armada_lib.results import RunStore

MULTIMODAL_PARAMETERS = (
    "profile", "teacher", "student", "methods", "manifold", "reading", "seeds", "threshold",
    "alpha", "beta", "gamma", "tau", "workers", "keep",
)  # fmt: skip
TASK = "mmimdb"


def multimodal(ns: dict[str, Any]) -> Plan:
    """Check the parameters of the chapter on MM-IMDb and make its specs; nothing is computed yet.

    Raises one clear error for an unknown parameter or name, a number out of range, data or
    checkpoints that are missing, and a store that cannot be written to.
    """
    got = guard.params(ns, MULTIMODAL_PARAMETERS)
    name, p = profile_of(got)
    block = p.multimodal
    if block is None:
        raise ValueError(f"profile {name!r} has no block 'multimodal'")
    teacher = block.teacher if got["teacher"] == "auto" else got["teacher"]
    check(teacher, p.teachers, f"teacher (profile {name})")
    student = several(got["student"], [block.student], p.students, f"student (profile {name})")[0]
    methods = methods_of(got["methods"], block.methods)
    manifolds = several(got["manifold"], block.manifolds, MANIFOLDS, "manifold loss")
    readings = several(got["reading"], block.readings, READINGS, "reading")
    seeds = seeds_of(got["seeds"], block.seeds)
    given = {k: got[k] for k in ("threshold", "alpha", "beta", "gamma", "tau")}
    RunStore().check()
    planned = specs.grid(name, [TASK], methods, manifolds, readings, seeds, student=student,
                         teacher=teacher, controls=block.controls, **given)  # fmt: skip
    return Plan(name, [teacher], [student], planned)


def posters(plan: Plan, n: int = 4) -> tuple[dict[str, list[Any]], list[str]]:
    """What the aligner's teacher has for the first evaluated plots, and what it was told of them.

    In the order of `figures.gallery`; nothing for a teacher that makes nothing to look at.
    """
    name, (_, held) = plan.teachers[0], run_data.examples(plan.specs[0])
    texts = held.teacher_texts[:n]
    if profiles.load(plan.profile).teacher(name).kind not in views.SHOW:
        return {}, texts
    return {name: views.sheet(views.show(plan.profile, name, texts))}, texts
