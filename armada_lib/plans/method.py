"""The chapter on the method: a few runs, whose students and aligners are compared pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from armada_lib import guard, run_data, specs
from armada_lib.plans.common import Plan, profile_of, seeds_of
from armada_lib.profiles import MANIFOLDS
from armada_lib.results import RunStore

METHOD_PARAMETERS = ("profile", "teacher", "seed", "workers")
NAMES = {"cosine": "cosine", "euclid": "Euclid", "elementwise": "element-wise"}


@dataclass(frozen=True)
class Pairs(Plan):
    """The runs of the chapter with a title each: no manifold loss, the three, two of them squared."""

    titles: list[str]

    @property
    def batch(self) -> int:
        """Examples in a batch of these runs."""
        return self.specs[0].training.batch_size


def method(ns: dict[str, Any]) -> Pairs:
    """Check the method chapter's parameters and make its runs; nothing is computed yet.

    One task with classes, the profile's first; ARMADA in the paper's reading at the profile's
    weights. Raises one clear error for an unknown parameter or name, or a store that cannot be
    written to.
    """
    got = guard.params(ns, METHOD_PARAMETERS)
    name, p = profile_of(got)
    p.teacher(got["teacher"])
    seed = seeds_of(got["seed"], [0])
    if len(seed) != 1:
        raise ValueError(f"this chapter takes one seed, got {seed}")
    task = next((t for t in p.nlu.tasks if run_data.task_of(p, t).kind == "class"), None)
    if task is None:
        raise ValueError(f"this chapter needs a task with classes, and profile {name} has none")
    RunStore().check()
    who = (p.nlu.student, got["teacher"])
    make = lambda **how: specs.spec(name, task, "armada", *who, seed=seed[0], **how)
    arms = {"no manifold loss": make(beta=0.0)}
    arms |= {NAMES[m]: make(manifold=m) for m in MANIFOLDS}
    arms |= {
        f"{NAMES[m]}, squared": make(manifold=m, distance="squared")
        for m in ("euclid", "elementwise")
    }
    return Pairs(name, [got["teacher"]], [p.nlu.student], list(arms.values()), list(arms))
